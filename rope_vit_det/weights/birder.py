"""Birder's weights files: `.pt` (a dict, by torch.save) and `.safetensors` (the same as metadata).

Formats: `birder.common.fs_ops.checkpoint_model` and `save_st`.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from ..models.variants import VARIANTS, is_birders
from ..utils.atomic_files import new_file
from .info import BIRDER_VERSION, TASK, WeightsInfo, architecture_from_config
from .safe import COMPILED, check_finite, check_state, load_safetensors, load_torch_file

SUFFIXES = (".pt", ".safetensors")
StateDict = Mapping[str, Tensor]


def read_weights_file(
    path: str | os.PathLike[str], network: str | None = None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Reads a file of birder's, or one that :func:`write_weights_file` wrote.

    Args:
        network: the architecture in it. None: what the file name begins with, up to a "_", "-" or
            the suffix; the longest known name wins. "": whoever takes the tensors knows it, and
            compares them.

    Returns:
        The state dict (birder's keys, on the CPU) and what the file says about it.

    Raises:
        InputError: the file is missing, damaged, no weights file, has tensors that are not the
            network's or not finite, or would run code.
    """
    path = Path(path)
    state, fields = read_fields(path)
    if network == "":
        return state, info_from_fields(path, fields, state, network="", tag=None)
    name, tag = network_of_file_name(path.name)
    if network is not None:
        if network not in VARIANTS:
            raise InputError(
                f"unknown network {network!r}; known are {', '.join(sorted(VARIANTS))}"
            )
        tag = tag if name == network else None
    elif name is None:
        raise InputError(
            f"{path} does not say which network it holds; begin its name with the network's, or "
            f"give network={_candidates(state, fields)}"
        )
    info = info_from_fields(path, fields, state, network=network or name or "", tag=tag)
    problem = misfit(state, info)
    if problem:
        height, width = info.image_size
        raise InputError(
            f"{path} has not the tensors of {info.network} at {height}x{width} px: "
            f"{problem}; give network={_candidates(state, fields)}"
        )
    return state, info


def write_weights_file(
    path: str | os.PathLike[str], state_dict: StateDict, info: WeightsInfo, *, force: bool = False
) -> None:
    """Writes a file that birder and this project can read, in the format of its suffix.

    Args:
        path: ends in `.pt` or `.safetensors`; begin its name with the network's.
        state_dict: with birder's keys.
        force: replace a file that is there.

    Raises:
        InputError: another suffix; the file is there and not to be replaced; the tensors are not
            those of ``info.network``.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: the name of a weights file must end in {' or '.join(SUFFIXES)}")
    problem = misfit(state_dict, info)
    if problem:
        raise InputError(f"{path}: these are not the tensors of {info.network}: {problem}")
    fields: dict[str, Any] = {
        "birder_version": info.birder_version or BIRDER_VERSION,
        "task": info.task,
        "signature": {
            "inputs": [{"data_shape": [0, 3, *info.image_size]}],
            "outputs": [{"data_shape": [0, info.num_classes]}],
        },
        "class_to_idx": dict(info.class_to_idx),
        "rgb_stats": {"mean": tuple(info.rgb_mean), "std": tuple(info.rgb_std)},
    }
    if info.config:
        fields["config"] = dict(info.config)
    # Copies, since torch.save writes all of a storage that is shared.
    state = OrderedDict((k, t.detach().cpu().contiguous().clone()) for k, t in state_dict.items())
    if path.suffix == ".pt":
        write_torch_file(path, {"state": state, **fields}, force=force)
        return
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
    with new_file(path, force=force) as temporary:
        # safetensors' own `save_file` makes a file that nobody else can read.
        temporary.write_bytes(save(dict(state), metadata))


def write_torch_file(path: str | os.PathLike[str], content: Any, *, force: bool = False) -> None:
    """`torch.save`, whole or not at all; the same content gives the same bytes.

    Raises:
        InputError: see :func:`new_file`.
    """
    # Given a path, torch would put the temporary name into the file.
    with new_file(path, force=force) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def read_fields(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file, and its other fields, not knowing its network.

    Raises:
        InputError: see :func:`read_weights_file`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = load_safetensors(path)
        state = dict(tensors)
        fields: dict[str, Any] = dict(metadata)
        for key in ("signature", "class_to_idx", "rgb_stats", "config"):
            try:
                fields |= {key: json.loads(fields[key])} if fields.get(key) else {}
            except json.JSONDecodeError:
                raise InputError(f"{path}: its metadata {key!r} is not JSON") from None
    else:
        content = load_torch_file(path)
        if not has_state(content):
            raise InputError(
                f"{path} is no weights file of birder's: it has no 'state'"
                + "; it looks like a Detectron2 checkpoint"
                * (isinstance(content, Mapping) and "model" in content)
                + "; nor has it the keys of timm, Meta, transformers or BAAI"
            )
        fields = dict(content)
        state = fields.pop("state")
    missing = [key for key in ("signature", "class_to_idx", "rgb_stats") if key not in fields]
    if missing:
        raise InputError(f"{path} is no weights file of birder's: it has no {missing[0]!r}")
    if fields.get("task", TASK) != TASK:
        raise InputError(f"{path} holds a network for {fields['task']}; wanted is one for {TASK}")
    check_state(path, state, "weights file of birder's")
    # Without the hooks that a pickled tensor may bring.
    state = {k.replace(COMPILED, ""): torch.as_tensor(t).detach() for k, t in state.items()}
    check_finite(path, state.items())
    return state, fields


def info_from_fields(
    path: str | os.PathLike[str],
    fields: Mapping[str, Any],
    state: StateDict,
    *,
    network: str,
    tag: str | None,
) -> WeightsInfo:
    """Makes sense of what :func:`read_fields` found.

    Raises:
        InputError: a field is not what birder writes, or this project cannot build what it says.
    """
    try:
        channels, *image_size = fields["signature"]["inputs"][0]["data_shape"][1:4]
        num_classes = fields["signature"]["outputs"][0]["data_shape"][1]
        info = WeightsInfo(
            network=network,
            tag=tag,
            num_classes=int(num_classes) if "classifier.weight" in state else 0,
            class_to_idx={str(k): int(v) for k, v in fields["class_to_idx"].items()},
            image_size=(int(image_size[0]), int(image_size[1])),
            rgb_mean=tuple(float(x) for x in fields["rgb_stats"]["mean"]),
            rgb_std=tuple(float(x) for x in fields["rgb_stats"]["std"]),
            config=dict(fields.get("config") or {}),
            birder_version=fields.get("birder_version"),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise InputError(
            f"{path}: its signature, class_to_idx, rgb_stats or config is not what birder writes"
        ) from None
    if channels != 3 or len(info.rgb_mean) != 3 or len(info.rgb_std) != 3:
        raise InputError(f"{path} is for images of {channels} channels; this project reads RGB")
    try:
        layers = architecture_from_config(info.config, network).get("num_layers")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    if isinstance(layers, int) and layers > len(state):  # building them would take for ever
        raise InputError(f"{path}: its config has {layers} layers, and it {len(state)} tensors")
    return info


def network_of_file_name(name: str) -> tuple[str | None, str | None]:
    """The network that a file name begins with, and its tag; (None, None): with none that we know.

    `rope_vit_reg4_b14_capi-imagenet21k.pt` gives ("rope_vit_reg4_b14", "capi-imagenet21k").
    """
    stem = re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))}|\.pth)$", "", name)
    for network in sorted(VARIANTS, key=len, reverse=True):
        rest = stem.removeprefix(network)
        if rest != stem and (not rest or rest[0] in "_-."):
            return network, rest[1:] or None
    return None, None


def misfit(state: StateDict, info: WeightsInfo) -> str | None:
    """What keeps tensors from being the network's; None: keys and shapes are all right."""
    try:
        with torch.device("meta"):  # shapes without memory
            wanted = info.build().state_dict()
    except Exception as error:  # whatever a size or a config that cannot be leads to
        return " ".join(str(error).split()) or type(error).__name__
    return difference(state, wanted)


def difference(state: StateDict, wanted: StateDict) -> str | None:
    """The first key or shape in which tensors are not those wanted; None: all are."""
    for what, keys in (
        ("missing", sorted(wanted.keys() - state.keys())),
        ("unexpected", sorted(state.keys() - wanted.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            return f"{what} {keys[0]}{more}"
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            return f"{key} is {tuple(state[key].shape)}, wanted {tuple(tensor.shape)}"
    return None


def _candidates(state: StateDict, fields: Mapping[str, Any]) -> str:
    """The networks whose tensors these could be, for the end of a message."""
    fitting = []
    for name in filter(is_birders, VARIANTS):
        with suppress(InputError):
            info = info_from_fields("", fields, state, network=name, tag=None)
            if misfit(state, info) is None:
                fitting.append(name)
    if fitting:
        return " or ".join(map(repr, fitting))
    return f"…, though no known network fits (known: {', '.join(sorted(VARIANTS))})"


def has_state(content: Any) -> bool:
    """Whether what a file of torch's holds is as birder writes it."""
    return isinstance(content, Mapping) and isinstance(content.get("state"), Mapping)

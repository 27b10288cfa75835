"""Checkpoints of LoRA's adapters and the heads alone, which name the weights they were added to."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .birder import write_torch_file
from .detectron2_format import BACKBONE, detectron2_checkpoint
from .hub import sha256_of
from .load import PREFIXES, birder_url, is_network_file, locate, published_url
from .safe import COMPILED, load_torch_file

# Under which the base stands in the state dict's metadata, where the backbone reads it.
_KEY = "rope_vit_det_base"
_PREFIX = f"{BACKBONE}."


def write_adapters(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str,
    *,
    force: bool = False,
) -> str:
    """Writes a detector without the network's own weights, which LoRA has left as they were.

    Args:
        source: a checkpoint (`.pth`) of a detector with adapters.
        output: the `.pth` to write.
        base: the weights that it was trained from: what MODEL.WEIGHTS takes, or a published name.
            The output names it so; where a path leads nowhere later, a file of that name in the
            working folder is taken.
        force: replace a file that is there.

    Returns:
        A line that says what was written.

    Raises:
        InputError: nothing was written: a file cannot be read, there are no adapters, or the
            network is not the base's, to the bit.
    """
    content = load_torch_file(source)
    tensors, metadata = plain_state(content)
    alone = {k: t for k, t in tensors.items() if not k.startswith(_PREFIX) or ".lora_" in k}
    if not any(".lora_" in key for key in alone):
        raise InputError(f"{source} has no adapters: MODEL.ROPE_VIT.LORA.RANK was 0")
    theirs, entry = _read_base(base)
    for key in tensors.keys() - alone:
        tensor, found = tensors[key], theirs.get(key)
        if found is None or not torch.equal(found.to(tensor.dtype), tensor):
            raise InputError(f"{source} was not trained from {base}: {key} is not the same")
    model = OrderedDict(alone)
    own = {"version": 1, **metadata.get(BACKBONE, {}), _KEY: entry}
    vars(model)["_metadata"] = OrderedDict(metadata) | {BACKBONE: own}
    kept = {key: content[key] for key in ("classes",) if key in content}
    write_torch_file(output, {"model": model, **kept}, force=force)
    return (
        f"wrote {output}: {len(alone)} tensors of adapters and heads; the other "
        f"{len(tensors) - len(alone)} are those of {entry['weights']} (sha256 {entry['sha256']})"
    )


def restore_base(state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Adds the base's tensors to a state dict that was written without them; others stay.

    Args:
        state: has the network's tensors under `prefix`.
        metadata: of the network's module.

    Raises:
        InputError: the base cannot be read, or is another file than it was.
    """
    match metadata.get(_KEY):
        case {"weights": str(weights), "sha256": str(sha256)}:
            for key, tensor in _read_base(weights, sha256)[0].items():
                state[prefix + key.removeprefix(_PREFIX)] = tensor


def plain_state(content: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a Detectron2 checkpoint, whole and under plain names, and their metadata.

    Args:
        content: of the file; something else has no tensors.

    Raises:
        InputError: see :func:`restore_base`.
    """
    model = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = {
        key.replace(COMPILED, ""): value
        for key, value in (model.items() if isinstance(model, Mapping) else ())
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    metadata = getattr(model, "_metadata", {})
    restore_base(tensors, _PREFIX, metadata.get(BACKBONE, {}))
    return tensors, metadata


def _read_base(weights: str, sha256: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The network's tensors, as in a detector, and what a checkpoint says of their file.

    Args:
        sha256: that the file must have; "": any.
    """
    path, name = locate(Path(weights) if weights.endswith(".pth") else weights)
    if name is None and not path.is_file():
        path = Path(path.name)  # brought along from another machine
        if not path.is_file():
            raise InputError(
                f"{weights}, to which these adapters belong: no such file; put it there, or into "
                "the folder that you work in"
            )
    found = sha256_of(path)
    if sha256 not in ("", found):
        raise InputError(
            f"these adapters belong to {weights} with sha256 {sha256}, and {path} has {found}"
        )
    source: str | Path = path
    if name or weights.startswith(PREFIXES) or is_network_file(path):
        source = detectron2_checkpoint(weights if name else birder_url(str(path)))
    tensors, _ = plain_state(load_torch_file(source, mmap=True))
    state = {k: t for k, t in tensors.items() if k.startswith(_PREFIX) and ".lora_" not in k}
    return state, {"weights": published_url(name) if name else weights, "sha256": found}

"""timm's weights files, and those of the publishers whose networks timm has.

By their keys, these layouts are known: timm's own; Meta's DINOv3 and Perception Encoder; Hugging
Face transformers' `DINOv3ViTModel`; EVA-02's, alone or in a CLIP model. What each becomes is tested
against timm's `checkpoint_filter_fn`.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from ..layers.patch_embed import pseudo_inverse_resize, resample_kernel
from ..models.variants import VARIANTS, default_image_size, is_birders
from ..utils.arguments import to_pair
from ..utils.atomic_files import new_file
from .birder import misfit, network_of_file_name
from .catalogue import PublishedWeights, published_weights
from .info import WeightsInfo
from .safe import (
    COMPILED,
    INDEX_SUFFIX,
    as_dtype,
    check_finite,
    check_state,
    load_safetensors,
    load_torch_file,
)

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
# Under which training codes keep a state dict; averaged weights first, as timm reads them.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "model", "module", "state_dict")
# A key of each layout; what training codes and CLIP models put before these keys is left out.
_LAYOUTS = {
    "patch_embed.proj.weight": "timm",
    "conv1.weight": "perception encoder",
    "embeddings.patch_embeddings.weight": "transformers",
}
_TOWERS = (
    *("", "visual.trunk.", "visual.", "module.", "module.visual.", "model.", "backbone."),
    COMPILED,
)
_TO_TIMM = {
    "timm": (
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
        (r"\.attn\.([qkv])_bias$", r".attn.\1_proj.bias"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    "perception encoder": (
        (r"^conv1\.", "patch_embed.proj."),
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.ls_([12])\.gamma$", r".gamma_\1"),
        (r"\.in_proj_(weight|bias)$", r".qkv.\1"),
        (r"\.out_proj\.", ".proj."),
        (r"\.c_fc\.", ".fc1."),
        (r"\.c_proj\.", ".fc2."),
        (r"^attn_pool\.attn\.", "attn_pool."),
        (r"^attn_pool\.layernorm\.", "attn_pool.norm."),
        (r"^attn_pool\.probe$", "attn_pool.latent"),
    ),
    "transformers": (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^(model\.)?layer\.", "blocks."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.attention\.", ".attn."),
        (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.mlp\.up_proj\.", ".mlp.up."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
}
# From timm's names to ours, and back.
_OURS = (
    ("cls_token", "class_token"),
    ("reg_token", "reg_tokens"),
    ("pos_embed", "pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    ("norm_pre.", "encoder.pre_block.0."),
    ("blocks.", "encoder.block."),
    (".gamma_1", ".layer_scale_1.gamma"),
    (".gamma_2", ".layer_scale_2.gamma"),
    ("head.", "classifier."),
)
_NOT_GATED = ((".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3."))
# timm's `model_args` that change no tensor's meaning or are read, and its poolings in our words.
_MODEL_ARGS = ("global_pool", "img_size", "in_chans", "num_classes", "dynamic_img_size")
_POOLINGS = {"avg": "mean", "token": "class_token", "map": None}
# What the networks have no use for: of pretraining, or what they compute themselves.
_NOT_THE_NETWORKS = re.compile(
    r".*mask_token$|lm_head\.|projectors\.|local_cls_norm\.|.*\.bias_mask$|logit_scale$"
    r"|rope\.(?!freqs$)|rope_embed\.|.*\.rope\.|.*\.freqs_(sin|cos)$|text\.|freqs_t_[xy]$"
)


def layout_of(keys: Iterable[str]) -> tuple[str, str] | None:
    """The layout of a state dict by its keys, and what stands before those; None: none of these."""
    known = set(keys)
    for tower in _TOWERS:
        for key, layout in _LAYOUTS.items():
            if tower + key in known:
                return layout, tower
    return None


def read_state(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Mapping[str, Tensor] | None:
    """The state dict of a file in one of these layouts, as it is; None: it is another one.

    Args:
        path: of a file, or of the index of safetensors in shards.
        dtype: of all floating-point tensors; None: as they are.

    Raises:
        InputError: the file is missing, damaged, or would run code.
    """
    path = Path(path)
    if path.name.endswith((".safetensors", INDEX_SUFFIX)):
        tensors, _ = load_safetensors(path, dtype)
        return None if layout_of(tensors) is None else tensors
    content = unwrapped(load_torch_file(path, mmap=True))  # else another reads it again
    if content is None:
        return None
    check_state(path, content, "weights file")
    # Copies, which do not change with the file.
    return {
        key: as_dtype(torch.as_tensor(tensor).detach(), dtype, copy=True)
        for key, tensor in content.items()
    }


def unwrapped(content: Any) -> dict[str, Any] | None:
    """The state dict in what a file of torch's holds; None: in none of these layouts."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        return None
    state = {str(key): tensor for key, tensor in content.items()}
    return None if layout_of(state) is None else state


def read_timm_file(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    network: str | None = None,
    published: PublishedWeights | None = None,
) -> tuple[State, WeightsInfo]:
    """Makes sense of what :func:`read_state` found.

    Args:
        network: the architecture. None: what the file name begins with, or timm's `config.json`
            beside it says, or the tensors fit.
        published: the entry of the file; None: statistics and licence are those of the network's
            entry whose tag stands in the file's name, or of its first.

    Returns:
        The state dict (our keys) and what is known about it. Its network is "" where several fit;
        their tensors are the same, but for biases of zero.

    Raises:
        InputError: no network, or not this one, has these tensors; or they are not finite.
    """
    path = Path(path)
    check_finite(path, ((k, state[k]) for k in state if not k.endswith("bias_mask")))
    config = _config_beside(path)
    network = network or network_of_file_name(path.name)[0] or config.get("architecture")
    if network is not None:
        if network not in VARIANTS:
            raise InputError(f"{path} holds a {network}, a network that is not known here")
        return _read(path, state, network, published, {} if published else config)
    found: list[tuple[State, WeightsInfo]] = []
    names = [name for name in VARIANTS if not is_birders(name) and _could_be(state, name)]
    if len(names) > 1:
        state = dict(state)  # to be read once for all of them
    for name in names:
        with suppress(InputError):
            found.append(_read(path, state, name, None, {}))
    if not found:
        raise InputError(f"{path} fits no known network (known: {', '.join(sorted(VARIANTS))})")
    if len(found) > 1:  # of one network at several sizes, the one of the table's
        sizes = [pair for pair in found if _is_native(pair[1])]
        found = sizes if len(sizes) == 1 else found
    ours, info = found[0]
    return ours, info if len(found) == 1 else replace(info, network="")


def _read(
    path: Path,
    state: Mapping[str, Tensor],
    network: str,
    published: PublishedWeights | None,
    timms: Mapping[str, Any],
) -> tuple[State, WeightsInfo]:
    """Of one network; `timms` is the `config.json` beside the file."""
    ours, left_out = from_timm(state, network)
    variant = VARIANTS[network]
    own = [each for each in published_weights().values() if each.network == network]
    said = max(own, key=lambda e: len(e.tag) * (e.tag in path.name), default=None)
    entry = published or said
    pretrained, arguments = timms.get("pretrained_cfg", {}), timms.get("model_args", {})
    size = arguments.get("img_size") or (entry.image_size if entry else default_image_size(network))
    patch = variant["patch_size"]
    if "pos_embedding" in ours and not arguments.get("img_size"):
        cells = ours["pos_embedding"].shape[1]
        if variant.get("pos_embed_special_tokens", True):  # here: the class token alone
            cells -= variant.get("class_token", True)
        size = round(max(cells, 0) ** 0.5) * patch
    config: dict[str, Any] = _poolings(path, state, variant, timms)
    if variant.get("attn_pool_num_heads") and "attn_pool.latent" not in ours:
        config["attn_pool_head"] = False
    if variant.get("post_norm", True) and "norm.weight" not in ours:
        config["post_norm"] = False
    info = WeightsInfo(
        network=network,
        tag=published.tag if published else network_of_file_name(path.name)[1],
        num_classes=len(ours["classifier.weight"]) if "classifier.weight" in ours else 0,
        class_to_idx={},
        image_size=to_pair(size),
        rgb_mean=tuple(pretrained.get("mean", entry.rgb_mean if entry else ())),
        rgb_std=tuple(pretrained.get("std", entry.rgb_std if entry else ())),
        config=config,
        license=pretrained.get("license", entry and entry.license),
    )
    problem = misfit(ours, info)
    if problem:
        raise InputError(f"{path} has not the tensors of {network}: {problem}")
    if left_out:
        logger.info("%s: left out, as no part of the network: %s", path, ", ".join(left_out))
    is_known = published or pretrained or not said or said.tag in path.name
    if not is_known and len({(each.rgb_mean, each.license) for each in own}) > 1:
        logger.warning(
            "%s does not say which weights of %s it has (%s in its name): pixel statistics and "
            "licence are those of %s",
            *(path, network, " or ".join(each.tag for each in own), own[0].name),
        )
    return ours, info


def from_timm(state: Mapping[str, Tensor], network: str) -> tuple[State, list[str]]:
    """A state dict of any of these layouts with our keys, and the keys that were left out.

    Raises:
        InputError: a bias that is not zero, or one of two norms, has no place in the network.
    """
    layout, tower = layout_of(state) or ("timm", "")
    renames = [(re.compile(pattern), new) for pattern, new in _TO_TIMM[layout]]
    names: dict[str, str] = {}  # the file's, by timm's
    left_out = []
    for key in state:
        name = key.removeprefix(tower)
        if not key.startswith(tower) or _NOT_THE_NETWORKS.match(name):
            left_out.append(key)
            if not name.endswith(".bias_mask"):
                continue
        for pattern, new in renames:
            name = pattern.sub(new, name)
        names[name] = key
    if layout == "perception encoder":
        state = _as_timms({name: state[key] for name, key in names.items()})
        names = {name: name for name in state}
    arguments = VARIANTS[network]
    gated = "mlp_layer" in arguments
    # From here on each tensor is taken once, so that a file larger than memory's rest does.
    ours: State = {}
    for name, key in names.items():
        if name == "rope.freqs":
            for i, frequencies in enumerate(state[key].unbind(1)):
                ours[f"encoder.block.{i}.attn.frequencies"] = frequencies
        elif ".attn." in name and re.search(r"\.(qkv|[qkv]_proj)\.|mask$", name):
            continue  # below, together
        elif gated and ".mlp.fc1." in name:
            stem, kind = _our_name(name, gated=gated).split("fc1")
            ours[f"{stem}fc1_g{kind}"], ours[f"{stem}fc1_x{kind}"] = state[key].chunk(2)
        else:
            ours[_our_name(name, gated=gated)] = state[key]
    for block in sorted({name.partition(".attn.")[0] for name in names if ".attn." in name}):
        stem = f"{block}.attn."
        own = {n.removeprefix(stem): key for n, key in names.items() if n.startswith(stem)}
        prefix = f"{_our_name(block + '.', gated=False)}attn.qkv."
        for name, tensor in _qkv(state, own, stem, arguments).items():
            ours[prefix + name] = tensor
    if {"norm.weight", "fc_norm.weight"} <= names.keys():
        raise InputError("they have two final norms, norm and fc_norm; networks here have one")
    kernel, patch = ours.get("conv_proj.weight"), arguments["patch_size"]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != patch:  # as timm does it
        logger.warning(
            "%s's patch kernel is resampled from %d to %d px", network, kernel.shape[-1], patch
        )
        resize = pseudo_inverse_resize(kernel.shape[-1], patch)
        ours["conv_proj.weight"] = resample_kernel(kernel.float(), resize).to(kernel.dtype)
    return {key: tensor.contiguous() for key, tensor in ours.items()}, left_out


def to_timm(state: Mapping[str, Tensor], network: str) -> State:
    """A state dict of ours with the keys that timm's network of that name has."""
    arguments = VARIANTS[network]
    unfused, gated = arguments.get("mlp_layer") == "NormSwiGLU", "mlp_layer" in arguments
    packed = gated and not unfused and arguments.get("pos_embed", True)
    timms: State = {}
    frequencies: dict[int, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for theirs, ours in (*_OURS, *(() if gated else _NOT_GATED)):
            name = name.replace(ours, theirs)
        if arguments.get("norm_pooled"):
            name = re.sub(r"^norm\.", "fc_norm.", name)
        stem = name.rpartition(".qkv.")[0]
        if name.endswith(".attn.frequencies"):
            frequencies[int(name.split(".")[1])] = tensor
        elif name.endswith(".attn.qkv.bias") and arguments.get("qkv_bias") == "qv":
            q, v = tensor.chunk(2)
            names = (".q_proj.bias", ".v_proj.bias") if unfused else (".q_bias", ".v_bias")
            timms |= {stem + names[0]: q, stem + names[1]: v}
        elif name.endswith(".attn.qkv.weight") and unfused:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            timms |= {f"{stem}.{part}_proj.weight": each for part, each in parts}
        elif packed and ".mlp.fc1_g." in name:
            other = state[key.replace("fc1_g", "fc1_x")]
            timms[name.replace("fc1_g", "fc1")] = torch.cat((tensor, other))
        elif not (packed and ".mlp.fc1_x." in name):
            timms[name] = tensor
    if frequencies:
        timms["rope.freqs"] = torch.stack([frequencies[i] for i in sorted(frequencies)], dim=1)
    return timms


def write_timm_file(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], info: WeightsInfo, *, force: bool
) -> None:
    """Writes a `.safetensors` that timm's network of that name loads.

    Args:
        state: with our keys.

    Raises:
        InputError: the file is there and not to be replaced, or cannot be written.
    """
    timms = {k: t.detach().cpu().clone() for k, t in to_timm(state, info.network).items()}
    with new_file(path, force=force) as temporary:
        temporary.write_bytes(save(timms, {"format": "pt"}))


def _our_name(key: str, *, gated: bool) -> str:
    key = key.replace(".mlp.up.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
    for theirs, ours in (*_OURS, *(() if gated else _NOT_GATED)):
        key = key.replace(theirs, ours)
    return re.sub(r"^fc_norm\.", "norm.", key)


def _qkv(
    state: Mapping[str, Tensor], own: Mapping[str, str], prefix: str, arguments: Mapping[str, Any]
) -> State:
    """Weight and bias of the joint layer, in whatever parts a file has them.

    Args:
        own: the file's keys of this attention, by timm's names within it.
        prefix: what stands before these.
    """
    if "qkv.weight" in own:
        weight = state[own["qkv.weight"]]
    elif all(f"{part}_proj.weight" in own for part in "qkv"):
        weights = [state[own[f"{part}_proj.weight"]] for part in "qkv"]
        if len({each.shape for each in weights}) > 1:
            raise InputError(f"{prefix}: queries, keys and values differ in shape")
        weight = torch.cat(weights)
    else:
        return {}
    zeros = weight.new_zeros(len(weight) // 3)
    if "qkv.bias" in own:
        bias = state[own["qkv.bias"]]
        if "qkv.bias_mask" in own:
            bias = torch.where(state[own["qkv.bias_mask"]].nan_to_num() == 0, 0, bias)
        biases = dict(zip("qkv", bias.chunk(3), strict=True))
    else:
        keys = {part: own.get(f"{part}_proj.bias") for part in "qkv"}
        biases = {part: state[key] if key else zeros for part, key in keys.items()}
    for part in "qkv":
        if part not in arguments.get("qkv_bias", "qkv") and biases.pop(part).any():
            raise InputError(
                f"{prefix}: the bias of {part} is not zero, and the network has none; for DINOv3, "
                "name the network with _qkvb"
            )
    return {"weight": weight} | ({"bias": torch.cat([*biases.values()])} if biases else {})


def _as_timms(state: State) -> State:
    """Perception Encoder's tensors under timm's names in timm's shapes; changes the dict."""
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"].reshape(1, *state["pos_embed"].shape[-2:])
    if "proj" in state:
        state["head.weight"] = state.pop("proj").T
        state["head.bias"] = torch.zeros(len(state["head.weight"]))
    for kind in ("weight", "bias"):
        joint = state.pop(f"attn_pool.qkv.{kind}", None)
        if joint is not None:
            q, k, v = joint.chunk(3)
            state |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat((k, v))}
    return state


def _config_beside(path: Path) -> dict[str, Any]:
    """timm's `config.json`, as it lies beside `model.safetensors` on the hub; {}: there is none.

    Raises:
        InputError: it cannot be read.
    """
    file = path.with_name("config.json")
    if path.stem != "model" or not file.exists():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}; repair it, or take it away") from None
    if not isinstance(config, dict) or "architecture" not in config:  # another publisher's
        return {}
    return {"pretrained_cfg": config, **config}  # older files have one dict for all


def _poolings(
    path: Path, state: Mapping[str, Tensor], variant: Mapping[str, Any], timms: Mapping[str, Any]
) -> dict[str, Any]:
    """How a file pools where its network does otherwise, with the keys of `WeightsInfo.config`.

    Raises:
        InputError: timm's `config.json` has an argument that cannot be built.
    """
    file, arguments = path.with_name("config.json"), timms.get("model_args", {})
    for key in arguments:
        if key not in _MODEL_ARGS and not key.endswith("_rate"):
            raise InputError(
                f"{file}: model_args has {key!r}, which this project cannot build; known are "
                + ", ".join(_MODEL_ARGS)
            )
    config: dict[str, Any] = {}
    pooling = arguments.get("global_pool", timms.get("global_pool", "map"))
    if pooling not in _POOLINGS:
        raise InputError(f"{file}: global_pool {pooling!r}; known are {', '.join(_POOLINGS)}")
    by_itself = "class_token" if variant.get("class_token", True) else "mean"
    if _POOLINGS[pooling] not in (None, variant.get("pooling") or by_itself):
        config["pooling"] = _POOLINGS[pooling]
    # EVA-02's pretraining has a norm that its fine-tuning takes for the pooled one's.
    is_pooled = any(key.endswith("fc_norm.weight") for key in state)
    if (is_pooled or timms) and is_pooled != variant.get("norm_pooled", False):
        config["norm_pooled"] = is_pooled
    return config


def _could_be(state: Mapping[str, Tensor], network: str) -> bool:
    """A quick look, before a network is built for a comparison."""
    layout, tower = layout_of(state) or ("", "")
    stem = state[tower + next(key for key, name in _LAYOUTS.items() if name == layout)]
    blocks = {
        found[1]
        for key in state
        if (found := re.search(r"\b(?:blocks|resblocks|layer)\.(\d+)\.", key))
    }
    wanted = [VARIANTS[network][key] for key in ("hidden_dim", "patch_size", "num_layers")]
    return [len(stem), stem.shape[-1], len(blocks)] == wanted


def _is_native(info: WeightsInfo) -> bool:
    return info.image_size == to_pair(default_image_size(info.network))

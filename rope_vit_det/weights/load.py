"""From a name or a path to a network with its weights."""

import inspect
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from ..errors import InputError
from ..layers.patch_embed import interpolate_position_table
from ..models.rope_vit import RoPEViT
from ..models.variants import create_model
from .birder import SUFFIXES, difference, has_state, read_weights_file
from .catalogue import resolve
from .hub import fetch
from .info import HEAD_PREFIXES, WeightsInfo
from .safe import as_dtype, load_torch_file
from .timm import read_state, read_timm_file, unwrapped

logger = logging.getLogger(__name__)

PREFIX = "birder:"
# Of addresses; what is in a file shows itself.
PREFIXES = (PREFIX, "timm:")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    network: str | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> tuple[RoPEViT, WeightsInfo]:
    """Builds the network of a weights file and loads it, on the CPU and in evaluation mode.

    Of safetensors, no more is held at any time than the network's tensors in their dtype and the
    one that is being read.

    Args:
        name_or_path: a published name (downloaded once; see :mod:`rope_vit_det.weights.hub`), or a
            file of birder's (`.pt`, `.safetensors`), timm's or a publisher's
            (:mod:`rope_vit_det.weights.timm`). `birder://NAME`, `timm://NAME`, `birder:/path` and
            `timm:/path` do as well.
        network: the architecture in a file whose name does not say.
        dtype: of the network.
        overrides: arguments of :func:`~rope_vit_det.models.create_model`, which beat what the file
            says, which beats the architecture. Another ``image_size`` resamples the position table
            for good; ``num_classes`` of 0 leaves the classifier out, another number than the file's
            gives a new one, of zeros.

    Returns:
        The network, and what the file says about itself (before the overrides).

    Raises:
        InputError: an unknown name, a file that is missing, damaged, not this network's, not
            finite, or would run code; a download that fails.
        ValueError: for a wrong override.
    """
    state, info = read_weights(name_or_path, network=network, dtype=dtype)
    # None is a value of an architecture's own arguments, else what the file says.
    own = inspect.signature(create_model).parameters
    overrides = {k: v for k, v in overrides.items() if v is not None or k not in own}
    with torch.device("meta"):  # the tensors of the file become its own
        model = info.build(**overrides)

    grid = (info.image_size[0] // model.patch_size, info.image_size[1] // model.patch_size)
    if "pos_embedding" in state:
        table, special = state["pos_embedding"], model.pos_special_tokens
        with torch.no_grad():
            table = interpolate_position_table(table, grid, model.pos_grid, special, antialias=True)
        state["pos_embedding"] = table
    fresh = model.state_dict()
    for key in [key for key in state if key.startswith(HEAD_PREFIXES) and key not in fresh]:
        del state[key]  # a part that an override leaves out
    if model.num_classes != info.num_classes:
        for key in fresh.keys() & {"classifier.weight", "classifier.bias"}:
            state[key] = torch.zeros(fresh[key].shape, dtype=dtype)
    problem = difference(state, fresh)
    if problem:
        raise ValueError(f"{name_or_path} does not fit the overrides {overrides}: {problem}")
    model.load_state_dict(state, assign=True)
    return model.eval(), info


def read_weights(
    name_or_path: str | os.PathLike[str],
    *,
    network: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], WeightsInfo]:
    """The state dict and info of a published name or a file of birder's, timm's or a publisher's.

    It tells these files apart.

    Args:
        name_or_path: see :func:`load_model`.
        network: the architecture, where the file does not say it; "": whoever takes the tensors
            knows it, where neither the name of the file nor they say.
        dtype: of all floating-point tensors; None: as they are.

    Raises:
        InputError: see :func:`load_model`.
    """
    path, name = locate(name_or_path)
    published = resolve(name) if name else None
    if published:
        if network not in (None, published.network):
            raise InputError(f"{name} is a {published.network}, not a {network}")
        network = published.network
    tensors = read_state(path, dtype)
    if tensors is None:
        state, info = read_weights_file(path, network)
        return {key: as_dtype(tensor, dtype) for key, tensor in state.items()}, info
    state, info = read_timm_file(path, tensors, network, published)
    if not info.network and network is None:
        raise InputError(f"{name_or_path} fits several networks; say which: network= (--network)")
    if info.license:
        logger.warning("%s: licence %s", name or path, info.license)
    return state, info


def birder_url(path: str) -> str:
    """`birder:/path`; a "?" is written as "%3F", since Detectron2 takes off what follows one."""
    if "?" in path:
        path = path.replace("%", "%25").replace("?", "%3F")
    return PREFIX + path


def published_url(name: str) -> str:
    """`birder://NAME` or `timm://NAME`.

    Raises:
        InputError: no weights are published under this name.
    """
    return f"{PREFIXES[resolve(name).hub_id is not None]}//{name}"


def locate(name_or_path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file of a published name (downloaded where it must be) or of a path; and the name.

    Raises:
        InputError: there is no such name or file, or the download fails.
    """
    text = os.fspath(name_or_path)
    prefix = next((each for each in PREFIXES if text.startswith(each)), "")
    rest = text.removeprefix(prefix)
    if prefix and rest.startswith("//") and not rest.startswith("///"):
        return fetch(resolve(rest[2:])), rest[2:]
    path = Path(rest)
    is_path = bool(prefix) or path.suffix in SUFFIXES or len(path.parts) > 1
    if prefix and not path.exists():
        path = Path(unquote(rest))
    if is_path or path.is_file() or not isinstance(name_or_path, str):
        return path, None
    return fetch(resolve(text)), text


def is_network_file(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file of a network alone, of birder's, timm's or a publisher's.

    Raises:
        InputError: the file is missing, damaged, or would run code.
    """
    suffix = Path(path).suffix
    if suffix not in (".pt", ".pth"):
        return suffix == ".safetensors"
    content = load_torch_file(path, mmap=True)
    return (suffix == ".pt" and has_state(content)) or unwrapped(content) is not None


def as_birder_url(path: str) -> str:
    """A plain path to a network's file as `birder:/path`, which Detectron2 can load; else as is.

    Detectron2's checkpointer sends plain paths past its PathManager.
    """
    if "://" in path or path.startswith(PREFIXES):
        return path
    try:
        return birder_url(path) if is_network_file(path) else path
    except InputError:
        return path  # whoever loads it will say what is wrong

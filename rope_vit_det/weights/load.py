"""From a name or a path to a network with its weights."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from ..errors import InputError
from ..layers.patch_embed import interpolate_position_table
from ..models.rope_vit import RoPEViT
from ..models.variants import create_model
from .birder import SUFFIXES, is_weights_file, read_weights_file
from .catalogue import resolve
from .hub import fetch
from .info import WeightsInfo, architecture_from_config

PREFIX = "birder:"


def load_model(
    name_or_path: str | os.PathLike[str], *, network: str | None = None, **overrides: Any
) -> tuple[RoPEViT, WeightsInfo]:
    """Builds the network of a weights file and loads it, on the CPU and in evaluation mode.

    Args:
        name_or_path: a published name (downloaded once; see :mod:`rope_vit_det.weights.hub`), or a
            `.pt` or `.safetensors` file of birder's. `birder://NAME` and `birder:/path` do as well.
        network: the architecture in a file whose name does not say.
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
    state, info = read_weights(name_or_path, network=network)
    if overrides.get("image_size") is None:
        overrides["image_size"] = info.image_size
    if overrides.get("num_classes") is None:
        overrides["num_classes"] = info.num_classes
    given = {key: value for key, value in overrides.items() if value is not None}
    architecture = architecture_from_config(info.config, info.network)
    model = create_model(info.network, **architecture | given)

    grid = tuple(side // model.patch_size for side in info.image_size)
    with torch.no_grad():
        state["pos_embedding"] = interpolate_position_table(
            state["pos_embedding"], grid, model.pos_grid, model.pos_special_tokens, antialias=True
        )
    if model.num_classes != info.num_classes:
        fresh = model.state_dict()
        for key in ("classifier.weight", "classifier.bias"):
            state.pop(key, None)
            if key in fresh:
                state[key] = fresh[key]
    model.load_state_dict(state)
    return model.eval(), info


def read_weights(
    name_or_path: str | os.PathLike[str], *, network: str | None = None
) -> tuple[dict[str, torch.Tensor], WeightsInfo]:
    """The state dict and info of a published name or a file; arguments as :func:`load_model`."""
    path, name = locate(name_or_path)
    if name is None:
        return read_weights_file(path, network)
    if network not in (None, resolve(name).network):
        raise InputError(f"{name} is a {resolve(name).network}, not a {network}")
    state, info = read_weights_file(path, resolve(name).network)
    return state, info


def birder_url(path: str) -> str:
    """`birder:/path`; a "?" is written as "%3F", since Detectron2 takes off what follows one."""
    if "?" in path:
        path = path.replace("%", "%25").replace("?", "%3F")
    return PREFIX + path


def locate(name_or_path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file of a published name (downloaded where it must be) or of a path; and the name.

    Raises:
        InputError: there is no such name or file, or the download fails.
    """
    text = os.fspath(name_or_path)
    if text.startswith(f"{PREFIX}//") and not text.startswith(f"{PREFIX}///"):
        name = text.removeprefix(f"{PREFIX}//")
        return fetch(resolve(name)), name
    path = Path(text.removeprefix(PREFIX))
    is_path = text.startswith(PREFIX) or path.suffix in SUFFIXES or len(path.parts) > 1
    if text.startswith(PREFIX) and not path.exists():
        path = Path(unquote(text.removeprefix(PREFIX)))
    if is_path or path.is_file() or not isinstance(name_or_path, str):
        return path, None
    return fetch(resolve(text)), text


def as_birder_url(path: str) -> str:
    """A plain path to a file of birder's as `birder:/path`, which Detectron2 can load; else as is.

    Detectron2's checkpointer sends plain paths past its PathManager.
    """
    if not path.endswith(SUFFIXES) or "://" in path or path.startswith(PREFIX):
        return path
    try:
        return birder_url(path) if is_weights_file(path) else path
    except InputError:
        return path  # whoever loads it will say what is wrong

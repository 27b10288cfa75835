"""Birder's state dicts as checkpoints that Detectron2's checkpointer loads under a detector."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ..errors import InputError
from .birder import network_of_file_name, write_torch_file
from .hub import cache_folder
from .info import HEAD_PREFIXES, WeightsInfo
from .load import locate, read_weights
from .safe import load_torch_file, shards

# Where the network lies in a detector.
BACKBONE = "backbone.net"
# Under which the file's info stands in the state dict's metadata, where the backbone reads it.
METADATA_KEY = "rope_vit_det"
_FORMAT = 2


def to_detectron2(
    state: Mapping[str, Tensor], info: WeightsInfo, *, source: str
) -> dict[str, "OrderedDict[str, Tensor]"]:
    """A checkpoint {"model": …} of the backbone alone.

    Args:
        state: birder's.
        info: travels with the tensors, for the backbone to compare with its config.
        source: where it is from, for messages.
    """
    model = OrderedDict(
        (f"{BACKBONE}.{key}", tensor)
        for key, tensor in state.items()
        if not key.startswith(HEAD_PREFIXES)
    )
    # Without thousands of names that a detector has no use for.
    entry = asdict(replace(info, class_to_idx={})) | {"source": source}
    # torch hands it to the module of this name; a plain attribute, so pickled with the dict.
    vars(model)["_metadata"] = OrderedDict({BACKBONE: {"version": 1, METADATA_KEY: entry}})
    return {"model": model}


def info_from_metadata(metadata: Mapping[str, Any]) -> tuple[WeightsInfo, str] | None:
    """Info and source that :func:`to_detectron2` left for a module; None: another checkpoint."""
    entry = metadata.get(METADATA_KEY)
    if entry is None:
        return None
    known = {field.name for field in fields(WeightsInfo)}
    return WeightsInfo(**{k: v for k, v in entry.items() if k in known}), entry["source"]


def read_info(url: str, dtype: torch.dtype = torch.float32) -> WeightsInfo:
    """What `birder://NAME` or `birder:/path` says about itself; converts it on the way.

    Args:
        dtype: of :func:`detectron2_checkpoint`.

    Raises:
        InputError: see :func:`detectron2_checkpoint`.
    """
    model = load_torch_file(detectron2_checkpoint(url, dtype), mmap=True)["model"]
    found = info_from_metadata(model._metadata[BACKBONE])
    assert found  # it has just been written
    return found[0]


def detectron2_checkpoint(url: str, dtype: torch.dtype = torch.float32) -> Path:
    """The converted file of `birder://NAME` or `birder:/path`, in the cache.

    It is made once for every version of the source, which is told by its checksum (a published
    name) or by its size and times (a path).

    Args:
        dtype: of the weights in it.

    Raises:
        InputError: see :func:`~rope_vit_det.weights.load.load_model`.
    """
    path, name = locate(url)
    if name is None and not path.is_file():
        raise InputError(f"{path}: no such file")
    stats = [os.stat(file) for file in (os.fspath(path), *shards(path))]
    files = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
    version = (_FORMAT, os.path.realpath(path), files, dtype)
    key = hashlib.sha256(repr(version).encode()).hexdigest()[:16]
    stem = (name or path.stem).replace("?", "_")  # what follows one, Detectron2 takes off
    target = cache_folder("detectron2") / f"{stem}-{key}.pth"
    # Each process of a training run comes here; the file appears whole even if locks do not work.
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            # Else the config knows the network, and the backbone compares the shapes.
            is_known = name is not None or network_of_file_name(path.name)[0] is not None
            state, info = read_weights(url, network=None if is_known else "", dtype=dtype)
            write_torch_file(target, to_detectron2(state, info, source=url), force=True)
    return target

"""Reading files of others without running what is in them.

A pickle is a program. Torch files are read as `weights_only`, Detectron2's `.pkl` by an unpickler
that knows arrays and builtins; whatever else a file asks for, it is refused by name.
"""

import collections
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .safe_numpy import NUMPY_GLOBALS, RefusedError

_CODE = re.compile(
    r"GLOBAL (?P<name>[\w.]+)|(?:class|function|reduce) <?(?:\w+ )?'?(?P<other>[\w.]+)"
)

# Of what lists the files of weights in shards, as huggingface_hub writes it.
INDEX_SUFFIX = ".safetensors.index.json"
# What torch.compile puts before the names in a module that it wraps.
COMPILED = "_orig_mod."


def load_torch_file(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """What `torch.save` wrote: tensors, arrays and builtins, onto the CPU.

    Args:
        mmap: leave the tensors on the disk until they are used, where the file allows it.

    Raises:
        InputError: the file is missing, damaged, no torch file, or would run code.
    """
    path = _existing(path)
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        # torch's warnings are about files that are then refused, in one line of ours.
        with torch.serialization.safe_globals(_TORCH_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # Without torch's advice to load the file all the same.
        message = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        found = _CODE.search(message)
        if found:
            raise _refusal(path, found["name"] or found["other"]) from None
        raise _reason(path) from None
    except Exception as error:  # what garbage leads to: RuntimeError, KeyError, EOFError, …
        if "TorchScript" in str(error):
            raise _refusal(path, "TorchScript") from None
        raise _reason(path) from None


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """A pickle of numpy arrays and builtins, as Detectron2's model zoo has them (`.pkl`).

    Raises:
        InputError: the file is missing, damaged, no pickle, or would run code.
    """
    path = _existing(path)
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except RefusedError as error:
        raise _refusal(path, str(error)) from None
    except Exception:
        raise _damaged(path) from None


def load_safetensors(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Each is read anew when it is asked for: who takes one after the other holds one.

    Args:
        path: of the file, or of the index (`….safetensors.index.json`) of one in shards.
        dtype: of all floating-point tensors; None: as they are.

    Raises:
        InputError: a file is missing, damaged, or no safetensors file.
    """
    files: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for shard in shards(_existing(path)):
        try:
            with safe_open(shard, framework="pt", device="cpu") as file:
                files |= dict.fromkeys(file.keys(), shard)
                metadata |= file.metadata() or {}
        except (SafetensorError, OSError, ValueError, RuntimeError):
            raise _damaged(shard) from None
    return _Safetensors(files, dtype), metadata


def shards(path: str | os.PathLike[str]) -> list[str]:
    """The safetensors files that an index names, in its folder; of another path, that alone.

    Raises:
        InputError: the index is damaged, or a file is missing.
    """
    path = Path(path)
    if not path.name.endswith(INDEX_SUFFIX):
        return [str(path)]
    try:
        names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
        files = sorted(path.with_name(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(str(path)) from None
    return [_existing(file) for file in files]


class _Safetensors(Mapping[str, Tensor]):
    """Tensors by name, read from their files when asked for.

    A file is open for one of them at a time: it never stands in memory beside the tensors.
    """

    def __init__(self, files: Mapping[str, str], dtype: torch.dtype | None) -> None:
        self._files = files
        self._dtype = dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self._files[key], framework="pt", device="cpu") as file:
            return as_dtype(file.get_tensor(key), self._dtype, copy=True)


def _not_plain(value: Any) -> str | None:
    """Why something in a state dict cannot be loaded as a tensor; None: it can."""
    if isinstance(value, np.ndarray):
        try:
            torch.as_tensor(value)
        except (TypeError, ValueError):  # texts, objects, another machine's byte order, …
            return f"an array of {value.dtype}, not a tensor"
    elif not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not a tensor"
    elif value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "a sparse, quantized or empty tensor, not a plain one"
    return None


def check_state(path: str | os.PathLike[str], state: Any, what: str) -> None:
    """Checks that a file holds tensors under names.

    Args:
        state: a state dict, if all is well.
        what: the file should be, for the message.

    Raises:
        InputError: it does not.
    """
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path} is no {what}: it holds no dict of tensors")
    for key, value in state.items():
        problem = _not_plain(value) if isinstance(key, str) else "not under a name"
        if problem:
            raise InputError(f"{path} is no {what}: its {key!r} is {problem}")


def check_finite(path: str | os.PathLike[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """
    Raises:
        InputError: a floating-point tensor holds a NaN or an infinity; names the first.
    """
    for key, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {key} has NaN or infinite values; get the file again")


def as_dtype(tensor: Tensor, dtype: torch.dtype | None, *, copy: bool = False) -> Tensor:
    """A floating-point tensor in that dtype; any other, and any for None, as it is."""
    own = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(own, copy=copy)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # of Python 2
            module = "builtins"
        if (module, name) not in _ALLOWED:
            raise RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


_BUILTINS = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("builtins", kind.__name__): kind for kind in _BUILTINS},
    **NUMPY_GLOBALS,
}
# What the arrays and scalars that Detectron2's hooks may save consist of, for torch.
_TORCH_GLOBALS: list[Any] = [
    (thing, f"{module}.{name}") for (module, name), thing in NUMPY_GLOBALS.items()
]


def _existing(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty: get or write it again")
    return path


def _refusal(path: str, what: str) -> InputError:
    return InputError(
        f"{path} is refused: it asks for {what}, so reading it would run code; "
        "get the weights as safetensors, or saved by torch.save as a dict of tensors"
    )


def _reason(path: str) -> InputError:
    """Of a file that torch cannot read, which may be a bare pickle of a protocol unknown to it."""
    try:
        load_pickle(path)
    except InputError as error:
        return error
    return _damaged(path)


def _damaged(path: str) -> InputError:
    kind = Path(path).suffix or "checkpoint"
    return InputError(f"{path} is damaged, or no {kind} file: get or write it again")

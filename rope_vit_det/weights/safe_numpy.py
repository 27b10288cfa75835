"""NumPy's arrays and scalars in pickles, of any version, built from checked parts.

A pickled dtype comes with flags, which tell NumPy whether the bytes of an array are pointers: a
file could name any. So the dtypes of files are stand-ins, of which only kind and byte order count.
"""

import codecs
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

_core = getattr(np, "_core", None) or np.core
# Booleans, whole and floating-point numbers, texts.
_KINDS = "biufcSU"


class _Dtype:
    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in _KINDS:
            raise ValueError(f"arrays of {code}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __new__(cls, *_: Any) -> "_Array":
        raise ValueError("an array that is not pickled as NumPy does")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, *rest = state
        super().__setstate__((version, shape, dtype.dtype, *rest))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # saved again as what it was


def _reconstruct(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,), "i1")


def _scalar(dtype: _Dtype, *value: Any) -> np.generic:
    return _core.multiarray.scalar(dtype.dtype, *value)


def _frombuffer(buffer: Any, dtype: _Dtype, *rest: Any) -> np.ndarray:
    return _core.numeric._frombuffer(buffer, dtype.dtype, *rest)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 2's bytes come back from a pickle, and nothing else of `codecs.encode`."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode({encoding!r})")
    return codecs.latin_1_encode(text)[0]


class RefusedError(Exception):
    """Says which global a pickle asked for."""


# By module and name, as pickles ask for them.
NUMPY_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{package}.{module}", name): function
        for package in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}

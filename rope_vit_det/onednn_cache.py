"""One bound for the two caches that convolutions on the CPU have.

oneDNN keeps compiled primitives, as many as `ONEDNN_PRIMITIVE_CACHE_CAPACITY` says. PyTorch's
binding to it, ideep, keeps a descriptor beside them for every shape, up to 1024 for each kind of
call; those pin the heap between activations, so that memory over images of all sizes grows all the
same. Its bound is `LRU_CACHE_CAPACITY`, which hardly anyone knows.
"""

import os

_ONEDNN, _IDEEP = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


def follow_onednn_bound() -> None:
    """Gives ideep's cache the bound that oneDNN's was given, where it has none of its own.

    It has an effect until the first convolution on the CPU, which reads the variable.
    """
    capacity = os.environ.get(_ONEDNN, "")
    if capacity.isdecimal():
        # 0 turns oneDNN's cache off; ideep's dies of it (SIGSEGV, torch 2.15)
        os.environ.setdefault(_IDEEP, str(max(1, int(capacity))))

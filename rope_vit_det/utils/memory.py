"""How much memory a process takes, and the caches that must not let it grow."""

import os
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def process_peak_mib() -> float:
    """Peak memory of this process so far, all that it holds included, in MiB (Linux)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"{_STATUS} has no VmHWM")


# oneDNN keeps compiled primitives, as many as the first of these says. PyTorch's binding to it,
# ideep, keeps a descriptor beside them for every shape, up to 1024 for each kind of call; those pin
# the heap between activations, so that memory over images of all sizes grows all the same. Its
# bound is the second, which hardly anyone knows.
_ONEDNN, _IDEEP = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


def bound_caches() -> None:
    """Gives ideep's cache the bound that oneDNN's was given, where it has none of its own.

    Runs and predictions of this project call it at their start; a script of your own that meets
    images of many sizes on the CPU calls it before its first convolution, which reads the bound.
    """
    capacity = os.environ.get(_ONEDNN, "")
    if capacity.isdecimal():
        # 0 turns oneDNN's cache off; ideep's dies of it (SIGSEGV, torch 2.15)
        os.environ.setdefault(_IDEEP, str(max(1, int(capacity))))


def peak_memory_mib(device: torch.device) -> float | None:
    """MiB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return process_peak_mib()
    except OSError:  # not Linux
        return None

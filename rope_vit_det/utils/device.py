"""The device that a network runs on."""

import time

import torch

from ..errors import InputError


def find_device(device: str | torch.device | None = None) -> torch.device:
    """A device that works here.

    Args:
        device: None: the GPU where there is one, else the CPU.

    Raises:
        InputError: it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {device} cannot be used here: {reason}") from None
    return device


def bf16_is_faster_on_cpu() -> bool:
    """Whether matrix products of this CPU are, by a measurement of a few milliseconds.

    CPUs with bf16 instructions can be several times faster in it than in float32, or half as fast.
    """
    return _seconds_of_products(torch.bfloat16) < _seconds_of_products(torch.float32)


def _seconds_of_products(dtype: torch.dtype) -> float:
    a, b = torch.ones(1000, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds)

"""The device that a network runs on."""

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

"""Logging how much memory a run takes."""

import torch
from detectron2.engine import HookBase

from ..process_memory import process_peak_mib

METRIC = "peak_memory_mib"


class PeakMemory(HookBase):
    """Logs the peak of what this process has taken so far: of GPU memory, or, on the CPU, in all.

    It belongs in front of the hook that writes.
    """

    def __init__(self, device: str) -> None:
        """
        Args:
            device: MODEL.DEVICE.
        """
        self._device = torch.device(device)

    def after_step(self) -> None:
        peak = peak_memory_mib(self._device)
        if peak is not None:
            self.trainer.storage.put_scalar(METRIC, peak, smoothing_hint=False)


def peak_memory_mib(device: torch.device) -> float | None:
    """MiB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return process_peak_mib()
    except OSError:  # not Linux
        return None

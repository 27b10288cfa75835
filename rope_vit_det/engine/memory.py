"""Logging how much memory a run takes."""

import logging

import torch
from detectron2.engine import HookBase

from ..process_memory import process_peak_mib

logger = logging.getLogger(__name__)


class PeakMemory(HookBase):
    """Logs the peak of what this process has taken: of GPU memory, or, on the CPU, in all.

    In the log at the end, not among the metrics, which a resumed run repeats to the last bit.
    """

    def __init__(self, device: str) -> None:
        """
        Args:
            device: MODEL.DEVICE.
        """
        self._device = torch.device(device)

    def after_train(self) -> None:
        peak = peak_memory_mib(self._device)
        if peak is not None:
            logger.info("Peak memory: %.0f MiB", peak)


def peak_memory_mib(device: torch.device) -> float | None:
    """MiB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return process_peak_mib()
    except OSError:  # not Linux
        return None

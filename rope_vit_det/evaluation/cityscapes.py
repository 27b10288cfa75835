"""Cityscapes' metrics on a NumPy that its scripts do not know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator


class InstanceEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, on NumPy 2.4 too."""

    def evaluate(self) -> Any:
        with _in1d():
            return super().evaluate()


class SemSegEvaluator(CityscapesSemSegEvaluator):
    """Detectron2's, on NumPy 2.4 too."""

    def evaluate(self) -> Any:
        with _in1d():
            return super().evaluate()


@contextmanager
def _in1d() -> Iterator[None]:
    """Gives NumPy its `in1d` back, which cityscapesScripts 2.3.0 calls and NumPy 2.4 lacks."""
    if hasattr(np, "in1d"):
        yield
        return
    np.in1d = np.isin  # the caller reshapes the answer anyway
    try:
        yield
    finally:
        del np.in1d

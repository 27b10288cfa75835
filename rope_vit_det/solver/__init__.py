"""Optimizers, and what each layer learns at."""

from .optimizers import OPTIMIZERS, build_optimizer

__all__ = ["OPTIMIZERS", "build_optimizer"]

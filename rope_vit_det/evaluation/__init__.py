"""Evaluators and plots."""

from .evaluators import EVALUATORS

__all__ = ["EVALUATORS"]

"""A trained detector on images and videos, in Python and for tools/predict.py.

It stands above the engine, whose configs and checkpoints it reads.
"""

from .predictor import Predictor

__all__ = ["Predictor"]

"""Downloads of published weights."""

from pathlib import Path

from .catalogue import PublishedWeights


def fetch(weights: PublishedWeights) -> Path:
    raise NotImplementedError

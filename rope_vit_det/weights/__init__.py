"""Names to files to networks: published weights, birder's files, `birder://` in Detectron2."""

from .birder import read_weights_file, write_weights_file
from .catalogue import PublishedWeights, published_weights, resolve
from .info import WeightsInfo
from .load import load_model

__all__ = [
    "PublishedWeights",
    "WeightsInfo",
    "load_model",
    "published_weights",
    "read_weights_file",
    "resolve",
    "write_weights_file",
]

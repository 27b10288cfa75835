"""Classes and embeddings of images, without Detectron2: the model card's other two uses."""

from .output import write_classes, write_embeddings
from .predict import Classes, Embeddings, classify, embed
from .transform import classification_transform

__all__ = [
    "Classes",
    "Embeddings",
    "classification_transform",
    "classify",
    "embed",
    "write_classes",
    "write_embeddings",
]

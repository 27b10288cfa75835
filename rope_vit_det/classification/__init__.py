"""Classes and embeddings of images, without Detectron2: the model card's other two uses."""

from .classify import Classes, Embeddings, classify, embed
from .output import write_classes, write_embeddings
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

"""Classes and embeddings of images, without Detectron2: the model card's other two uses."""

from .images import find_images
from .output import write_classes, write_embeddings
from .predict import Classes, Embeddings, classify, embed
from .transform import classification_transform

__all__ = [
    "Classes",
    "Embeddings",
    "classification_transform",
    "classify",
    "embed",
    "find_images",
    "write_classes",
    "write_embeddings",
]

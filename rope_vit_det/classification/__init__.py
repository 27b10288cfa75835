"""Classes and embeddings of images, without Detectron2: the model card's other two uses."""

from ..utils.image_files import find_images
from .classify import Classes, Embeddings, classification_transform, classify, embed
from .output import write_classes, write_embeddings

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

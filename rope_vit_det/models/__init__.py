"""The RoPE ViT and its named architectures; nothing of Detectron2 in here."""

from .rope_vit import RoPEViT
from .variants import VARIANTS, create_model

__all__ = ["VARIANTS", "RoPEViT", "create_model"]

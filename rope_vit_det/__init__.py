"""The RoPE ViT as a detection backbone for Detectron2. Importing it registers the backbones."""

from .backbone import RoPEViTBackbone, RoPEViTPyramid, create_backbone
from .config import add_rope_vit_config
from .models import RoPEViT, create_model
from .weights import load_model

__all__ = [
    "RoPEViT",
    "RoPEViTBackbone",
    "RoPEViTPyramid",
    "add_rope_vit_config",
    "create_backbone",
    "create_model",
    "load_model",
]
__version__ = "0.1.0"

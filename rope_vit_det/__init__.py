"""The RoPE ViT as a detection backbone for Detectron2. Importing it registers the backbones."""

from .config import add_rope_vit_config
from .models import create_model

from . import backbone  # isort: skip  # registers the builders

__all__ = ["add_rope_vit_config", "create_model"]
__version__ = "0.1.0"

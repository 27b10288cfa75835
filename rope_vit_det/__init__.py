"""The RoPE ViT as a detection backbone for Detectron2.

Importing it registers the backbones, and `birder://` addresses for MODEL.WEIGHTS; where the
environment bounds oneDNN's cache, the one beside it gets that bound as well (`onednn_cache.py`).
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "rope_vit_det needs Detectron2, which is not on PyPI: install your own, or run "
        "rope-vit-det-install-detectron2 (in the sources: tools/install_detectron2.py)"
    ) from None

from .backbone import RoPEViTBackbone, RoPEViTPyramid, create_backbone
from .config import add_rope_vit_config
from .models import RoPEViT, create_model
from .onednn_cache import follow_onednn_bound
from .prediction import Predictor
from .use import use_rope_vit
from .weights import load_model, path_handler  # noqa: F401 (registers itself)

follow_onednn_bound()

__all__ = [
    "Predictor",
    "RoPEViT",
    "RoPEViTBackbone",
    "RoPEViTPyramid",
    "add_rope_vit_config",
    "create_backbone",
    "create_model",
    "load_model",
    "use_rope_vit",
]
__version__ = "0.1.0"

"""The RoPE ViT as a detection backbone for Detectron2.

Where Detectron2 is installed, importing this registers the backbones, and `birder://` addresses for
MODEL.WEIGHTS. The network and its weights (`create_model`, `load_model`, `classification`) need no
Detectron2.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import RoPEViTBackbone, RoPEViTPyramid, create_backbone
    from .config.keys import add_rope_vit_config
    from .config.use import use_rope_vit
    from .models import RoPEViT, create_model
    from .prediction import Predictor
    from .solver import build_optimizer
    from .utils.memory import bound_caches
    from .weights import load_model

__all__ = [
    "Predictor",
    "RoPEViT",
    "RoPEViTBackbone",
    "RoPEViTPyramid",
    "add_rope_vit_config",
    "bound_caches",
    "build_optimizer",
    "create_backbone",
    "create_model",
    "load_model",
    "use_rope_vit",
]
__version__ = "0.2.0"

_HOMES = {
    "Predictor": "prediction",
    "RoPEViT": "models",
    "RoPEViTBackbone": "backbone",
    "RoPEViTPyramid": "backbone",
    "add_rope_vit_config": "config.keys",
    "bound_caches": "utils.memory",
    "build_optimizer": "solver",
    "create_backbone": "backbone",
    "create_model": "models",
    "load_model": "weights",
    "use_rope_vit": "config.use",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            f"rope_vit_det.{name} needs Detectron2, which is not on PyPI: install your own, or run "
            "rope-vit-det-install-detectron2 (in the sources: tools/install_detectron2.py)",
            name="detectron2",
        ) from None
    globals()[name] = value
    return value


if importlib.util.find_spec("detectron2") is not None:
    from . import backbone  # noqa: F401 (registers itself)

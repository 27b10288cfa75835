"""The RoPE ViT as a detection backbone for Detectron2.

Importing this registers the backbones with Detectron2, and `birder://` addresses for MODEL.WEIGHTS,
whichever of the two is imported first; it loads nothing else, registers no dataset and sets no
environment variable. The network and its weights (`create_model`, `load_model`, `classification`)
need no Detectron2.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import RoPEViTBackbone as RoPEViTBackbone
    from .backbone import RoPEViTPyramid as RoPEViTPyramid
    from .backbone import create_backbone as create_backbone
    from .config.keys import add_rope_vit_config as add_rope_vit_config
    from .config.use import use_rope_vit as use_rope_vit
    from .models import RoPEViT as RoPEViT
    from .models import create_model as create_model
    from .prediction import Predictor as Predictor
    from .solver import build_optimizer as build_optimizer
    from .utils.memory import bound_caches as bound_caches
    from .weights import load_model as load_model

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
__all__ = [*_HOMES]


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


# Ours by Detectron2's modules: each registers itself, and is imported right behind that module,
# whoever imports it. Before that nobody can look into Detectron2's registries; and the seconds that
# it takes to load are not spent where it is not used, as by `create_model` or `--help`.
_REGISTERED_BEHIND = {
    "detectron2.modeling": f"{__name__}.backbone",
    "detectron2.utils.file_io": f"{__name__}.path_handler",
}


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTERED_BEHIND:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == fullname:  # a loader may serve several modules
                    importlib.import_module(_REGISTERED_BEHIND[fullname])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
for _theirs, _ours in _REGISTERED_BEHIND.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)

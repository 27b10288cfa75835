"""Keys of `detectron2.projects`, for configs that use them."""

from typing import Any

from detectron2.config import CfgNode

from ..errors import InputError

_POINT_REND_MASK_HEADS = ("PointRendMaskHead", "ImplicitPointRendMaskHead", "CoarseMaskHead")


def add_project_config(cfg: CfgNode, path: str) -> None:
    """Adds PointRend's keys to a config where the yaml that comes next needs them.

    Only there: other configs stay what `get_cfg` and `add_rope_vit_config` can load again. The
    import registers PointRend's heads.

    Args:
        cfg: changed in place.
        path: of the yaml.

    Raises:
        InputError: the yaml needs PointRend, and this Detectron2 comes without it.
    """
    if "POINT_HEAD" in cfg.MODEL or not _needs_point_rend(_read(cfg, path)):
        return
    try:
        from detectron2.projects.point_rend import add_pointrend_config
    except ImportError:
        raise InputError(
            f"{path} needs detectron2.projects.point_rend, which this Detectron2 comes without; "
            "install one that has it: tools/install_detectron2.py"
        ) from None
    add_pointrend_config(cfg)


def _read(cfg: CfgNode, path: str) -> dict[str, Any]:
    try:
        return type(cfg).load_yaml_with_base(path) or {}
    except Exception:
        # Python tags, as in the zoo's Base-RetinaNet.yaml, or a broken file: merging it will tell.
        return {}


def _needs_point_rend(yaml: dict[str, Any]) -> bool:
    model = yaml.get("MODEL") or {}
    head = (model.get("ROI_MASK_HEAD") or {}).get("NAME")
    return "POINT_HEAD" in model or head in _POINT_REND_MASK_HEADS

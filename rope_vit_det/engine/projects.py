"""Keys of `detectron2.projects`, for configs that use them."""

from typing import Any

from detectron2.config import CfgNode

from ..errors import InputError

_POINT_REND_MASK_HEADS = ("PointRendMaskHead", "ImplicitPointRendMaskHead", "CoarseMaskHead")


def add_project_config(cfg: CfgNode, yaml: dict[str, Any], path: str) -> None:
    """Adds PointRend's keys to a config where the yaml that comes next needs them.

    Only there: other configs stay what `get_cfg` and `add_rope_vit_config` can load again. The
    import registers PointRend's heads.

    Args:
        cfg: changed in place.
        yaml: what comes next.
        path: of the yaml, for messages.

    Raises:
        InputError: the yaml needs PointRend, and this Detectron2 comes without it.
    """
    if "POINT_HEAD" in cfg.MODEL or not _needs_point_rend(yaml):
        return
    try:
        from detectron2.projects.point_rend import add_pointrend_config
    except ImportError:
        raise InputError(
            f"{path} needs detectron2.projects.point_rend, which this Detectron2 comes without; "
            "install one that has it: tools/install_detectron2.py"
        ) from None
    add_pointrend_config(cfg)


def _needs_point_rend(yaml: dict[str, Any]) -> bool:
    model = _section(yaml, "MODEL")
    head = _section(model, "ROI_MASK_HEAD").get("NAME")
    return "POINT_HEAD" in model or head in _POINT_REND_MASK_HEADS


def _section(yaml: dict[str, Any], key: str) -> dict[str, Any]:
    # Of what is no section, the merge will tell.
    return yaml[key] if isinstance(yaml.get(key), dict) else {}

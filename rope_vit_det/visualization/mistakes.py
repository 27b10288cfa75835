"""Drawing what a detector found, what is no object, and what it missed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.utils.visualizer import Visualizer

from ..evaluation.matching import ImageMatches
from .sheets import caption_below, readable_scale

# Okabe and Ito's, which the colour-blind can tell apart too; RGB.
FOUND, FALSE, MISSED = (0, 158, 115), (213, 94, 0), (86, 180, 233)
_COLOURS = {"found": FOUND, "false": FALSE, "missed": MISSED}
_MAX_LABELS = 50  # of more, the picture would disappear behind them


def draw_mistakes(
    image: np.ndarray, matches: ImageMatches, class_names: Mapping[int, str], *, masks: bool
) -> np.ndarray:
    """Found objects in green, false ones in orange, missed ones in blue, and a line of counts.

    Args:
        image: RGB, (H, W, 3) uint8.
        class_names: by category id.
        masks: draw masks as well as boxes.

    Returns:
        RGB, uint8; small images are enlarged. Where more than 50 objects are drawn, they bear no
        names and scores.
    """
    canvas = Visualizer(image, scale=readable_scale(image))
    kinds = [(kind, getattr(matches, kind), colour) for kind, colour in _COLOURS.items()]
    has_labels = sum(len(entries) for _, entries, _ in kinds) <= _MAX_LABELS
    for kind, entries, colour in kinds:
        canvas.overlay_instances(
            boxes=np.array([_box(each) for each in entries]),
            masks=[each["segmentation"] for each in entries] if masks else None,
            labels=[_label(each, class_names, kind) for each in entries] if has_labels else None,
            assigned_colors=[np.array(colour) / 255] * len(entries),
            alpha=0.35,
        )
    counts = [(f"{len(entries)} {kind}", colour) for kind, entries, colour in kinds]
    return caption_below(canvas.output.get_image(), matches.image["file_name"], counts)


def _label(entry: Mapping[str, Any], class_names: Mapping[int, str], kind: str) -> str:
    name = class_names[entry["category_id"]]
    name = name if kind == "found" else f"{kind} {name}"
    return f"{name} {entry['score']:.0%}" if "score" in entry else name


def _box(entry: Mapping[str, Any]) -> list[float]:
    box = entry["bbox"] if "bbox" in entry else mask_util.toBbox(entry["segmentation"])
    x, y, width, height = box
    return [x, y, x + width, y + height]

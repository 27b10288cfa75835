"""A colour for each class."""

import colorsys
from collections.abc import Sequence

from detectron2.data.catalog import Metadata

# The golden angle in turns: neighbours differ, however many classes there are.
_TURN = 0.381966


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """RGB, 0 to 255, of classes 0, 1, …; the same for the same class, whatever their number."""
    colours = (colorsys.hsv_to_rgb(i * _TURN % 1, 0.9, 0.95) for i in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def class_metadata(names: Sequence[str]) -> Metadata:
    """What Detectron2's :class:`Visualizer` wants to know about classes."""
    return Metadata(thing_classes=list(names), thing_colors=class_colours(len(names)))

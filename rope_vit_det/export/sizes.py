"""Which image sizes an exported file takes."""

import math
from typing import Any

from detectron2.modeling.backbone import Backbone
from torch import nn
from torch.export import Dim

from ..models import RoPEViT

# Pixels, about, of the sides of the images that graphs are made from: small ones are quick, and in
# larger ones no level of a pyramid is so small that its size could be taken for a constant.
_TRACED = 256
# Shown where an image of another size is refused.
REFUSAL = "height_and_width_must_be_multiples_of_{step}"


def size_multiple(detector: nn.Module) -> int:
    """What height and width must be multiples of: 32, and a whole number of windows.

    A grid with smaller windows along its edges has another graph.

    Args:
        detector: Detectron2's, with a RoPE ViT in its backbone.
    """
    backbone: Backbone = detector.backbone
    step = math.lcm(32, max(backbone.size_divisibility, 1))
    for module in backbone.modules():
        if isinstance(module, RoPEViT) and module.window_size:
            step = math.lcm(step, module.patch_stride * module.window_size)
    return step


def traced_size(step: int) -> tuple[int, int]:
    """(height, width) of the images that a graph is made from: neither equal nor a single step."""
    steps = max(2, _TRACED // step)
    return steps * step, (steps + 1) * step


def other_size(step: int) -> tuple[int, int]:
    """(height, width) of the images that a graph is checked with, taller than wide."""
    height, width = traced_size(step)
    return width + step, height


def dynamic_sides(backbone: Backbone, step: int) -> tuple[Any, Any]:
    """Height and width as any multiples of a step, for `torch.export`."""
    # What it serves: two cells on the coarsest level, and more.
    coarsest = max(int(shape.stride) for shape in backbone.output_shape().values())
    least = coarsest // step + 1
    return step * Dim("rows", min=least), step * Dim("columns", min=least)

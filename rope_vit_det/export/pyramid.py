"""Backbones with their pyramid, from pixels, and the sizes of images that graphs of them take."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.export import Dim

from ..models import RoPEViT
from ..utils.torch_private import assert_in_graph


class Pyramid(nn.Module):
    """A detector's backbone, from pixels."""

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, detector: nn.Module, step: int | None = None) -> None:
        """
        Args:
            detector: Detectron2's.
            step: of which height and width must be multiples, to be checked in the graph of
                `torch.export`; None: they are not.
        """
        super().__init__()
        self.backbone = detector.backbone
        self.step = step
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, detector.get_buffer(name).detach().clone())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W), 0 to 255, in the channel order of INPUT.FORMAT, to feature maps."""
        if self.step is not None:
            # On tensors: to the exporter, sizes are multiples already, and nothing to check.
            for side in images.shape[-2:]:
                rest = torch.scalar_tensor(side, dtype=torch.int64) % self.step
                assert_in_graph(rest == 0, f"height and width must be multiples of {self.step}")
        return self.backbone((images - self.pixel_mean) / self.pixel_std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The images that normalised ones were."""
        return images * self.pixel_std + self.pixel_mean


class PaddedBackbone(Backbone):
    """A backbone that asks for images padded to a multiple of its own choice."""

    def __init__(
        self, run: Callable[[Tensor], Mapping[str, Tensor]], shapes: dict[str, ShapeSpec], step: int
    ) -> None:
        """
        Args:
            run: a backbone, or a function that stands for one.
            shapes: of its feature maps.
            step: of which height and width shall be multiples.
        """
        super().__init__()
        self.run = run
        self.shapes = shapes
        self.step = step

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """Normalised images (N, 3, H, W) to feature maps."""
        return self.run(images)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes

    @property
    def size_divisibility(self) -> int:
        return self.step


def with_padding(
    detector: nn.Module, step: int, run: Callable[[Tensor], Mapping[str, Tensor]] | None = None
) -> nn.Module:
    """A copy of a detector with a :class:`PaddedBackbone`; all other modules are shared with it.

    Args:
        run: in the place of its backbone; None: the backbone itself.
    """
    backbone: Backbone = detector.backbone
    padded = PaddedBackbone(run or backbone, backbone.output_shape(), step)
    copied = copy.copy(detector)
    copied._modules = {**detector._modules, "backbone": padded.eval()}
    return copied


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


def image_sizes(step: int) -> list[tuple[int, int]]:
    """(height, width) of the image that a graph is made from, and of two that it is checked with.

    The one has the same size, the other another one, and is taller than wide.
    """
    height, width = traced_size(step)
    return [(height, width), (height, width), (width + step, height)]


def dynamic_sides(backbone: Backbone, step: int) -> tuple[Any, Any]:
    """Height and width as any multiples of a step, for `torch.export`."""
    # What it serves: two cells on the coarsest level, and more.
    coarsest = max(int(shape.stride) for shape in backbone.output_shape().values())
    least = coarsest // step + 1
    return step * Dim("rows", min=least), step * Dim("columns", min=least)

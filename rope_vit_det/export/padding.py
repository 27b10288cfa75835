"""Detectors whose images are padded to the sizes that an exported file takes."""

import copy
from collections.abc import Callable, Mapping

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn


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

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.step}


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

"""Backbones with their pyramid, from pixels, and by `torch.export`."""

import torch
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..utils.torch_private import assert_in_graph, drop_guards
from .sizes import dynamic_sides


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


def export_pyramid(pyramid: Pyramid, images: Tensor, step: int) -> ExportedProgram:
    """A pyramid by `torch.export`, with any batch, height and width.

    Args:
        images: (2 or more, 3, H, W) to export with.
        step: of which height and width are multiples.
    """
    rows, columns = dynamic_sides(pyramid.backbone, step)
    shapes = ({0: Dim("batch", min=1), 2: rows, 3: columns},)
    with torch.no_grad():
        program = torch.export.export(pyramid, (images,), dynamic_shapes=shapes)
    # Newer torch would refuse other sizes by what it concluded from the multiple, in terms that
    # nobody can read, before the check in the graph. Ranges are checked all the same.
    drop_guards(program)
    return program

"""AP of exported files, beside that of what they were made from."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor, nn

from ..engine import Trainer
from ..errors import RunError
from .detector import to_instances

Run = Callable[[Tensor], Mapping[str, Tensor]]


class ExportedDetector(nn.Module):
    """An exported detector with the interface of Detectron2's, for its evaluation."""

    def __init__(self, run: Run, step: int, pixel_mean: Tensor) -> None:
        """
        Args:
            run: from an image to tensors, see
                :func:`~rope_vit_det.export.detector.trace_detector`.
            step: of which height and width are multiples.
            pixel_mean: (3, 1, 1), what images are padded with.
        """
        super().__init__()
        self.run = run
        self.step = step
        self.register_buffer("pixel_mean", pixel_mean.detach().clone())

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As Detectron2's meta architectures."""
        return [{"instances": self._find(each)} for each in inputs]

    def _find(self, item: dict[str, Any]) -> Instances:
        image = item["image"].to(self.pixel_mean)
        height, width = image.shape[-2:]
        missing = (-height % self.step, -width % self.step)
        padded = F.pad(image - self.pixel_mean, (0, missing[1], 0, missing[0])) + self.pixel_mean
        found = to_instances(self.run(padded), (height, width))
        return detector_postprocess(found, item.get("height", height), item.get("width", width))


class ExportedBackbone(Backbone):
    """An exported backbone in the place of a detector's own."""

    def __init__(self, run: Run, step: int, detector: nn.Module) -> None:
        """
        Args:
            run: from images (N, 3, H, W) in pixels to feature maps.
            step: of which height and width are multiples.
            detector: Detectron2's, whose backbone was exported.
        """
        super().__init__()
        self.run = run
        self.step = step
        self.shapes = detector.backbone.output_shape()
        self.statistics = (detector.pixel_mean.detach(), detector.pixel_std.detach())

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        """Normalised images to feature maps."""
        mean, std = self.statistics
        return self.run(images * std + mean)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes

    @property
    def size_divisibility(self) -> int:
        return self.step

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.step}


def with_backbone(detector: nn.Module, backbone: Backbone) -> nn.Module:
    """A copy of a detector, all but the backbone shared with it."""
    copied = copy.copy(detector)
    copied._modules = {**detector._modules, "backbone": backbone}
    return copied


def compare_ap(cfg: CfgNode, detector: nn.Module, exported: nn.Module, most: float) -> str:
    """Evaluates both on DATASETS.TEST and says what they reach.

    Args:
        most: AP points, of 100, that the exported one may lose on any task.

    Raises:
        RunError: it loses more.
    """
    with tempfile.TemporaryDirectory() as folder:  # a training's own results stay
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        eager, other = (
            _average_precisions(Trainer.test(cfg, model)) for model in (detector, exported)
        )
    rows = [
        f"{task} AP: eager {eager[task]:.3f}, exported {other[task]:.3f}, lost "
        f"{eager[task] - other[task]:.3f}"
        for task in eager
    ]
    told = "; ".join(rows)
    if not all(eager[task] - other[task] <= most for task in eager):
        raise RunError(f"{told}: more than --max-ap-loss {most}; nothing was written")
    return told


def _average_precisions(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every AP of results, which nest by dataset where there are several."""
    found = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            found |= _average_precisions(value, f"{prefix}{key} ")
        elif key == "AP":
            found[prefix.strip()] = float(value)
    return found

"""Detectors as TorchScript."""

import warnings
from collections.abc import Mapping
from typing import Optional

import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.export.flatten import InstancesSchema
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import InputError


def pad(image: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """An image (3, H, W), padded at the bottom and the right to multiples, and its own (H, W)."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % step, 0, -height % step))
    return padded, torch.tensor([height, width])


def find_instances(detector: nn.Module, image: Tensor, size: Tensor) -> Instances:
    """What the exported detector finds, by the detector itself.

    Args:
        image: (3, H, W), 0 to 255, in the channel order of INPUT.FORMAT.
        size: (2,), the height and width of what counts in it; the rest is cut off, and padded anew
            by Detectron2.

    Returns:
        Detections in pixels of that image; masks as probabilities in their boxes, (N, 1, 28, 28).

    Raises:
        InputError: it finds no instances.
    """
    inputs = [{"image": image[:, : size[0], : size[1]]}]
    if isinstance(detector, GeneralizedRCNN):
        return detector.inference(inputs, do_postprocess=False)[0]
    output = detector(inputs)[0]
    if set(output) != {"instances"}:
        raise InputError(
            f"{type(detector).__name__} gives {', '.join(output)}; what can be exported are "
            "detectors of instances (for others, the backbone: --output NAME.onnx or NAME.pt2)"
        )
    return output["instances"]


def trace_detector(detector: nn.Module, image: Tensor, step: int) -> torch.jit.ScriptModule:
    """A detector as TorchScript, for images of many sizes.

    Args:
        detector: in evaluation mode, of
            :func:`~rope_vit_det.export.pyramid.with_padding`.
        image: (3, H, W) to trace with, of any size.
        step: of which height and width must be multiples; others are refused.

    Returns:
        A module from what :func:`pad` gives (without a size, all of the image counts) to a dict of
        tensors: pred_boxes (N, 4) in pixels, x and y of two corners; scores (N,); pred_classes
        (N,); and, where the detector has them, pred_masks (N, 1, 28, 28), probabilities in the box.
    """
    inputs = pad(image, step)
    adapter = TracingAdapter(detector, inputs, inference_func=find_instances)
    with torch.no_grad(), warnings.catch_warnings():
        # What is taken for a constant is compared with other images and sizes afterwards.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_AsDict(adapter), inputs, check_trace=False, strict=False)
        return torch.jit.script(_SizeCheck(traced, step))


def to_instances(found: Mapping[str, Tensor], size: tuple[int, int]) -> Instances:
    """Detectron2's structure of what an exported detector gives.

    Args:
        size: (height, width) of the image.
    """
    fields = dict(found)
    return Instances(size, pred_boxes=Boxes(fields.pop("pred_boxes")), **fields)


class _AsDict(nn.Module):
    def __init__(self, adapter: TracingAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, image: Tensor, size: Tensor) -> dict[str, Tensor]:
        values = self.adapter(image, size)
        schema = self.adapter.outputs_schema
        assert isinstance(schema, InstancesSchema)
        return dict(zip(schema.keys, values[:-1], strict=True))  # the last one is the size


class _SizeCheck(nn.Module):
    step: torch.jit.Final[int]

    def __init__(self, traced: torch.jit.ScriptModule, step: int) -> None:
        super().__init__()
        self.traced = traced
        self.step = step

    # Optional: TorchScript of torch 2.6 reads no "| None".
    def forward(self, image: Tensor, size: Optional[Tensor] = None) -> dict[str, Tensor]:  # noqa: UP045
        rests = [side % self.step for side in image.shape[-2:]]
        if image.dim() != 3 or image.size(0) != 3 or image.numel() == 0 or rests != [0, 0]:
            raise ValueError(
                f"the image has the shape {image.shape}; wanted: (3, H, W), with H and W multiples "
                f"of {self.step}: pad it at the bottom and the right"
            )
        if size is None:
            size = torch.tensor([image.size(1), image.size(2)])
        return self.traced(image, size)

"""Exported files against what they were made from, on images they were not made with."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances, pairwise_iou
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.demo.dataset import draw_scene
from ..errors import RunError
from ..utils.image_files import read_rgb
from .traced_detector import find_instances, pad, to_instances

# Largest differences that float32 explains: of a score or a mask's probability; of a box or a
# keypoint, in pixels; of a feature map or a heatmap, relative to its largest value. NumPy's maximum
# of a NaN is one.
_FEATURE = 1e-3
LIMITS = {"boxes": 0.5, "scores": 1e-3, "masks": 1e-3, "keypoints": 0.5, "heatmaps": _FEATURE}
ONNX_LIMITS = {"boxes": 0.01, "scores": 1e-5, "masks": 1e-4, "keypoints": 0.01, "heatmaps": 1e-4}
_PIXELS = ("boxes", "keypoints")
# Of keypoints. A heatmap may have two peaks, of which rounding says which is higher.
_MOST = 0.9


def check_images(
    paths: Sequence[str], sizes: Sequence[tuple[int, int]], channels: str
) -> list[Tensor]:
    """Images of given sizes, one a size.

    Args:
        paths: of image files; without any, images of the demo's kind are drawn.
        sizes: (height, width) in pixels, to which they are scaled.
        channels: INPUT.FORMAT, "RGB" or "BGR".

    Returns:
        (3, H, W) each, float32, 0 to 255.

    Raises:
        InputError: a file cannot be read.
    """
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate(sizes):
        pixels = read_rgb(paths[i % len(paths)]) if paths else draw_scene(rng).image[..., ::-1]
        scaled = convert_PIL_to_numpy(Image.fromarray(pixels).resize((width, height)), channels)
        images.append(torch.from_numpy(np.array(scaled, order="C")).permute(2, 0, 1).float())
    return images


def compare_detections(
    detector: nn.Module,
    exported: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    images: Sequence[Tensor],
    threshold: float,
    step: int,
    limits: Mapping[str, float] = LIMITS,
) -> str:
    """Compares what is found, and says how far apart it is.

    Large logits take the eager detector's own float32 further from float64 than the limits are.
    What counts there is the distance from float64, which may be twice the eager one's.

    Args:
        detector: of :func:`~rope_vit_det.export.pyramid.with_padding`.
        exported: see :func:`~rope_vit_det.export.traced_detector.trace_detector`.
        threshold: of the scores; detections as near to it as scores may differ are left out.
        step: of which height and width of the exported detector's images are multiples.
        limits: the largest differences.

    Raises:
        RunError: they are too far apart.
    """
    inputs = [pad(image, step) for image in images]

    def find(model: nn.Module) -> list[Instances]:
        with torch.no_grad():
            return [find_instances(model, *each) for each in inputs]

    eager, reference = find(detector), "the eager detector"
    found = [
        to_instances(exported(*each), expected.image_size)
        for each, expected in zip(inputs, eager, strict=True)
    ]
    surely = threshold + limits["scores"]
    furthest = _furthest(eager, found, surely)
    if not _is_within(furthest, limits):
        with _Float64():
            exact = find(copy.deepcopy(detector).double())
        own = _furthest(exact, eager, surely)
        if not _is_within(own, limits):
            limits = {
                name: max(limit, min(2 * own.get(name, 0.0), LIMITS[name]))
                for name, limit in limits.items()
            }
            furthest = _furthest(exact, found, surely)
            reference = f"it in float64, from which the eager one differs by {_words(own)}"
    if not _is_within(furthest, limits):
        raise RunError(
            f"the exported detector differs from {reference}: {_words(furthest)}; "
            "nothing was written"
        )
    number = sum(map(len, eager))
    summary = (
        f"{number} detections in {_sizes(images)} compared with {reference}; largest "
        f"differences: {_words(furthest)}"
    )
    return summary if number else f"{summary} (nothing was found in them: name others with --image)"


def compare_features(
    pyramid: nn.Module, exported: Callable[[Tensor], Mapping[str, Tensor]], images: Sequence[Tensor]
) -> str:
    """Compares feature maps, and says how far apart they are.

    Args:
        images: (N, 3, H, W) each.

    Raises:
        RunError: they are too far apart.
    """
    furthest: dict[str, float] = {}
    for image in images:
        with torch.no_grad():
            expected, found = pyramid(image), exported(image)
        for name, ours in expected.items():
            distance = ((found[name] - ours).abs().max() / ours.abs().max()).item()
            furthest[name] = np.maximum(furthest.get(name, 0.0), distance)
    summary = _words(dict(sorted(furthest.items())))
    if not all(distance <= _FEATURE for distance in furthest.values()):
        raise RunError(
            f"the exported backbone differs from the eager one, relative to the largest value by: "
            f"{summary}; nothing was written"
        )
    return (
        f"{_sizes(images)} compared with the eager backbone; largest differences, relative to the "
        f"largest value: {summary}"
    )


class _Float64(TorchFunctionMode):
    """In which boxes, in Detectron2 always float32, may have scores in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.torchvision.nms:
            args = [each.double() if isinstance(each, Tensor) else each for each in args]
        return func(*args, **(kwargs or {}))


def _furthest(
    some: Sequence[Instances], others: Sequence[Instances], surely: float
) -> dict[str, float]:
    """The largest distances in any image, of detections with scores above `surely`."""
    furthest = {"boxes": 0.0, "scores": 0.0}
    for pair in zip(some, others, strict=True):
        for one, other in (pair, pair[::-1]):  # both ways: nothing may be missing, and nothing new
            for name, distance in _distances(one[one.scores > surely], other).items():
                furthest[name] = np.maximum(furthest.get(name, 0.0), distance)
    return furthest


def _is_within(furthest: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    # A NaN is not within.
    return all(distance <= limits[name] for name, distance in furthest.items())


def _words(furthest: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {distance:.1e}{' px' * (name in _PIXELS)}" for name, distance in furthest.items()
    )


def _distances(some: Instances, others: Instances) -> dict[str, float]:
    """How far each detection is from the nearest other one of its class."""
    if len(some) == 0:
        return {}
    same = some.pred_classes[:, None] == others.pred_classes[None]
    if not same.any(dim=1).all():
        return {"boxes": float("inf"), "scores": float("inf")}
    iou = pairwise_iou(some.pred_boxes, others.pred_boxes)
    scores = (some.scores[:, None] - others.scores[None]).abs()
    # Of several on the same spot, the one with the same score.
    nearest = torch.where(same, iou - scores, -2.0).argmax(dim=1)
    others = others[nearest]
    distances = {
        "boxes": (some.pred_boxes.tensor - others.pred_boxes.tensor).abs().max().item(),
        "scores": (some.scores - others.scores).abs().max().item(),
    }
    if some.has("pred_masks"):
        distances["masks"] = (some.pred_masks - others.pred_masks).abs().max().item()
    if some.has("pred_keypoints"):
        heatmaps = some.pred_keypoint_heatmaps
        far = (heatmaps - others.pred_keypoint_heatmaps).abs().max() / heatmaps.abs().max()
        moved = (some.pred_keypoints - others.pred_keypoints).abs().amax(dim=2)
        distances |= {"heatmaps": far.item(), "keypoints": moved.quantile(_MOST).item()}
    return distances


def _sizes(images: Sequence[Tensor]) -> str:
    shapes = [f"{len(i)} x " * (i.dim() == 4) + f"{i.shape[-2]}x{i.shape[-1]}" for i in images]
    return f"images of {', '.join(dict.fromkeys(shapes))} px"

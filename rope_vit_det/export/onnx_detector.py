"""Inference of Detectron2's detectors, written so that exporters can follow it.

Detectron2's own asks in the middle how many boxes there are; here no line depends on the answer.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling import (
    FCOS,
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    GeneralizedRCNN,
    RetinaNet,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import Tensor, nn
from torchvision.ops import nms

from ..errors import InputError
from ..heads import FastCascadeROIHeads, FastMaskHead, FastROIHeads, FastRPN

# By the names that Detectron2 gives the parts. Of a subclass nobody knows what it does otherwise;
# layers of backbones and heads are free.
_KINDS: dict[str, tuple[type, ...]] = {
    "": (GeneralizedRCNN, RetinaNet, FCOS),
    "proposal_generator": (RPN, FastRPN),
    "anchor_generator": (DefaultAnchorGenerator,),
    "roi_heads": (StandardROIHeads, CascadeROIHeads, FastROIHeads, FastCascadeROIHeads),
    "box_predictor": (FastRCNNOutputLayers, nn.ModuleList),
    "level_poolers": (ROIAlign, nn.ModuleList),
}
_FORWARDS = {
    "mask_head": (BaseMaskRCNNHead.forward, FastMaskHead.forward),
    "keypoint_head": (BaseKeypointRCNNHead.forward,),
}

_LEAST = torch.finfo(torch.float32).min


class OnnxDetector(nn.Module):
    """A detector of instances in terms of tensors, for one image at a time."""

    def __init__(self, detector: nn.Module) -> None:
        """
        Args:
            detector: Detectron2's, in evaluation mode.

        Raises:
            InputError: a part of it is of a kind that is not known here.
        """
        super().__init__()
        _check_parts(detector)
        self.detector = detector
        self.names = ["pred_boxes", "scores", "pred_classes"]
        heads: Any = getattr(detector, "roi_heads", None)
        if heads is not None and heads.mask_on:
            self.names.append("pred_masks")
        if heads is not None and heads.keypoint_on:
            self.names += ["pred_keypoints", "pred_keypoint_heatmaps"]

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """What Detectron2's detector finds.

        Args:
            image: (3, H, W), 0 to 255, in the channel order of INPUT.FORMAT; H and W are the
                multiples that the network wants.
            size: (2,), the height and width of what counts in it, which lack less than a multiple.

        Returns:
            In the order of `names`: boxes (N, 4) in pixels, of two corners; scores (N,); classes
            (N,); and, where the detector has them, masks (N, 1, 28, 28), probabilities in the box;
            keypoints (N, K, 3) as x, y and score, and their heatmaps (N, K, 56, 56).
        """
        detector: Any = self.detector
        rows, columns = (torch.arange(side) for side in image.shape[-2:])
        inside = (rows[:, None] < size[0]) & (columns < size[1])
        pixels = (image - detector.pixel_mean) / detector.pixel_std
        features = detector.backbone(torch.where(inside, pixels, 0.0)[None])
        limits = size.flip(0).float().repeat(2)  # of x, y, x, y
        if not isinstance(detector, GeneralizedRCNN):
            return _detect_densely(detector, features, limits)
        proposals = _propose(detector.proposal_generator, features, limits)
        return _detect_in_rois(detector.roi_heads, features, proposals, limits)


def _check_parts(detector: nn.Module) -> None:
    parts = dict(detector.named_modules())
    if isinstance(detector, GeneralizedRCNN):
        parts.setdefault("proposal_generator", detector.proposal_generator)
    for path, part in parts.items():
        name = [""] + [each for each in path.split(".") if not each.isdigit()]
        kinds, forwards = _KINDS.get(name[-1]), _FORWARDS.get(name[-1])
        if (kinds and type(part) not in kinds) or (forwards and type(part).forward not in forwards):
            raise InputError(
                f"{path or 'MODEL.META_ARCHITECTURE'} is a {type(part).__name__}, of which no "
                "whole detector can be exported as ONNX; export the backbone: --part backbone"
            )


def _propose(rpn: Any, features: dict[str, Tensor], limits: Tensor) -> Tensor:
    """Proposals (R, 4): Detectron2's `find_top_rpn_proposals`."""
    maps = [features[name] for name in rpn.in_features]
    found = []
    outputs = rpn.rpn_head(maps)
    for anchors, logits, deltas in zip(rpn.anchor_generator(maps), *outputs, strict=True):
        deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        scores, best = _top(logits[0].permute(1, 2, 0).flatten(), rpn.pre_nms_topk[False])
        boxes = rpn.box2box_transform.apply_deltas(deltas[best], anchors.tensor[best])
        boxes = _clip(boxes, limits)
        scores = torch.where(_larger(boxes, rpn.min_box_size), scores, -torch.inf)
        kept = _nms(boxes[None], scores[None, None], rpn.nms_thresh, _LEAST)[:, 2]
        found.append((boxes[kept], scores[kept]))
    boxes, scores = map(torch.cat, zip(*found, strict=True))
    return boxes[_top(scores, rpn.post_nms_topk[False])[1]]


def _detect_in_rois(
    heads: Any, features: dict[str, Tensor], boxes: Tensor, limits: Tensor
) -> tuple[Tensor, ...]:
    """Detections in proposals (R, 4): `StandardROIHeads` and `CascadeROIHeads`."""
    is_cascade = isinstance(heads, CascadeROIHeads)
    stages = heads.box_head if is_cascade else [heads.box_head]
    predictors = heads.box_predictor if is_cascade else [heads.box_predictor]
    scores = boxes.new_zeros(boxes.shape[0], 1)
    for stage, predictor in zip(stages, predictors, strict=True):
        pooled, order = _pool(heads.box_pooler, features, heads.box_in_features, boxes)
        logits, deltas = predictor(stage(pooled))
        probabilities = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=-1)
        scores = scores[order] + probabilities
        boxes = predictor.box2box_transform.apply_deltas(deltas, boxes[order])
        boxes = _clip(boxes.unflatten(1, (-1, 4)), limits)  # (R, C, 4), or with C = 1 for all
        boxes = boxes[:, 0] if is_cascade else boxes
    boxes, scores, classes = _keep(
        boxes[:, None] if is_cascade else boxes,
        scores[:, :-1] * (1 / len(stages)),
        predictor.test_nms_thresh,
        predictor.test_score_thresh,
        predictor.test_topk_per_image,
    )
    results = [boxes, scores, classes]
    if heads.mask_on:
        pooled, order = _pool(heads.mask_pooler, features, heads.mask_in_features, boxes)
        masks = heads.mask_head.layers(pooled)[order.argsort()]
        if masks.shape[1] > 1:
            masks = masks[torch.arange(masks.shape[0]), classes][:, None]
        results.append(masks.sigmoid())
    if heads.keypoint_on:
        names = heads.keypoint_in_features
        pooled, order = _pool(heads.keypoint_pooler, features, names, boxes)
        heatmaps = heads.keypoint_head.layers(pooled)[order.argsort()]
        results += [_find_keypoints(heatmaps, boxes), heatmaps]
    return tuple(results)


def _detect_densely(
    detector: Any, features: dict[str, Tensor], limits: Tensor
) -> tuple[Tensor, ...]:
    """Detections in all places of the feature maps: `RetinaNet` and `FCOS`."""
    maps = [features[name] for name in detector.head_in_features]
    found = []
    for anchors, *outputs in zip(
        detector.anchor_generator(maps), *detector.head(maps), strict=True
    ):
        sizes = (detector.num_classes, 4, 1)
        logits, deltas, *centers = (
            permute_to_N_HWA_K(each, size)[0] for each, size in zip(outputs, sizes, strict=False)
        )
        scores = logits.sigmoid()
        for center in centers:
            scores = (scores * center.sigmoid()).sqrt()
        scores, best = _top(scores.flatten(), detector.test_topk_candidates)
        where, classes = best // detector.num_classes, best % detector.num_classes
        boxes = detector.box2box_transform.apply_deltas(deltas[where], anchors.tensor[where])
        found.append((boxes, scores, classes))
    boxes, scores, classes = map(torch.cat, zip(*found, strict=True))
    numbers = torch.arange(detector.num_classes)
    boxes, scores, classes = _keep(
        boxes[:, None],
        torch.where(classes[:, None] == numbers, scores[:, None], -torch.inf),
        detector.test_nms_thresh,
        detector.test_score_thresh,
        detector.max_detections_per_image,
    )
    boxes = _clip(boxes, limits)
    kept = _larger(boxes, 0).nonzero()[:, 0]
    return boxes[kept], scores[kept], classes[kept]


def _keep(
    boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best, each class for itself: boxes (N, 4), scores (N,) and classes (N,).

    Args:
        boxes: (R, K, 4), or (R, 1, 4) for all classes.
        scores: (R, K).
    """
    # Classes with boxes of their own are to NMS as images of one class.
    own = boxes.shape[1] > 1
    batch = scores.T[:, None] if own else scores.T[None]
    kept = _nms(boxes.transpose(0, 1), batch, overlap, least)
    image, classes, rows = kept.unbind(dim=1)
    classes = image if own else classes
    scores, best = _top(scores[rows, classes], most)
    return boxes[rows, image][best], scores, classes[best]


def _pool(
    pooler: Any, features: dict[str, Tensor], names: Sequence[str], boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """What Detectron2's `ROIPooler` cuts out, (R, C, S, S), a level after the other.

    Returns:
        And in which order (R,) the boxes are.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    levels = pooler.canonical_level + (sides / pooler.canonical_box_size + 1e-8).log2()
    levels = levels.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    rois = F.pad(boxes, (1, 0))  # all of image 0
    orders, pooled = [], []
    for level, (name, pool) in enumerate(zip(names, pooler.level_poolers, strict=True)):
        orders.append((levels == level).nonzero()[:, 0])
        pooled.append(pool(features[name], rois[orders[-1]]))
    return torch.cat(pooled), torch.cat(orders)


def _top(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scores (R,), from the best on, and where they were; -1: all."""
    number = scores.shape[0]
    return scores.topk(number if most < 0 else torch.sym_min(number, most))


def _clip(boxes: Tensor, limits: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), limits)


def _larger(boxes: Tensor, side: float) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2] > side).all(dim=1)


@torch.library.custom_op("rope_vit_det::nms", mutates_args=())
def _nms(boxes: Tensor, scores: Tensor, overlap: float, least: float) -> Tensor:
    """ONNX's NonMaxSuppression: rows (N, 3) of image, class and box.

    Args:
        boxes: (B, R, 4).
        scores: (B, C, R).
        overlap: as of torchvision's.
        least: scores are above.
    """
    kept = []
    for image, number in itertools.product(*map(range, scores.shape[:2])):
        of_class = scores[image, number]
        rows = nms(boxes[image], of_class, overlap)
        rows = rows[of_class[rows] > least]
        kept.append(torch.stack([rows * 0 + image, rows * 0 + number, rows], dim=1))
    return torch.cat(kept)


@_nms.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, least: float) -> Tensor:
    number = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(number, 3, dtype=torch.int64)


@torch.library.custom_op("rope_vit_det::find_keypoints", mutates_args=())
def _find_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """x, y and score (N, K, 3) of the peaks of heatmaps (N, K, S, S) in boxes (N, 4)."""
    return heatmaps_to_keypoints(heatmaps, boxes)[:, :, [0, 1, 3]]


@_find_keypoints.register_fake
def _(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    return heatmaps.new_empty(*heatmaps.shape[:2], 3)


NMS = torch.ops.rope_vit_det.nms.default
FIND_KEYPOINTS = torch.ops.rope_vit_det.find_keypoints.default

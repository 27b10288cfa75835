"""Parts of Detectron2's detectors with the same parameters and values, in less time on GPUs.

A config chooses them by name: MODEL.PROPOSAL_GENERATOR.NAME "FastRPN", MODEL.ROI_HEADS.NAME
"FastROIHeads" or "FastCascadeROIHeads", MODEL.ROI_BOX_HEAD.NAME "FastBoxHead",
MODEL.ROI_MASK_HEAD.NAME "FastMaskHead", and "FastLN" as the norm of these heads and of our
pyramids.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .layers.graphs import is_building_graph

# Pairs of boxes that are looked at together: 256 MiB for each of three numbers.
_MAX_PAIRS = 2**26
# Steps between two looks at whether suppression has come to an end, for which the host waits.
_STEPS = 8


class FastLayerNorm(LayerNorm):
    """Detectron2's channels-first :class:`LayerNorm` by torch's kernel, which wants them last."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, in the precision of the weights."""
        x = x.permute(0, 2, 3, 1).to(self.weight.dtype)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def norm_by_name(name: str | Callable[[int], nn.Module]) -> str | Callable[[int], nn.Module]:
    """What Detectron2's `get_norm` takes, where a config may name "FastLN" beside its own."""
    return FastLayerNorm if name == "FastLN" else name


class _KnowsFastLN:
    """A head of Detectron2's whose NORM may be "FastLN"."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        found = super().from_config(cfg, input_shape)  # type: ignore[misc]
        return found | {"conv_norm": norm_by_name(found["conv_norm"])}


@ROI_BOX_HEAD_REGISTRY.register()
class FastBoxHead(_KnowsFastLN, FastRCNNConvFCHead):
    """Detectron2's :class:`FastRCNNConvFCHead`, whose NORM may be "FastLN"."""


@ROI_MASK_HEAD_REGISTRY.register()
class FastMaskHead(_KnowsFastLN, MaskRCNNConvUpsampleHead):
    """Detectron2's :class:`MaskRCNNConvUpsampleHead`, whose NORM may be "FastLN"."""

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """See :class:`BaseMaskRCNNHead`; in training the targets of an image are drawn at once."""
        for each in instances:
            if each.has("gt_masks") and type(each.gt_masks) is PolygonMasks:
                each.gt_masks = FastPolygonMasks(each.gt_masks.polygons)
        return super().forward(x, instances)


class FastPolygonMasks(PolygonMasks):
    """Detectron2's :class:`PolygonMasks`, of which one call draws those of all boxes."""

    def __init__(self, polygons: list[list[np.ndarray]]) -> None:
        """
        Args:
            polygons: of other masks: they are neither checked nor copied once more.
        """
        self.polygons = polygons

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """See :meth:`PolygonMasks.crop_and_resize`."""
        if not len(boxes):
            return boxes.new_empty((0, mask_size, mask_size), dtype=torch.bool)
        moved = []
        for polygons, box in zip(self.polygons, boxes.cpu().numpy(), strict=True):
            sides = np.array([mask_size / max(side, 0.1) for side in box[2:] - box[:2]])
            moved += [((each.reshape(-1, 2) - box[:2]) * sides).ravel() for each in polygons]
        drawn = iter(mask_util.frPyObjects(moved, mask_size, mask_size) if moved else ())
        nothing = mask_util.encode(np.zeros((mask_size, mask_size), np.uint8, order="F"))
        masks = [
            mask_util.merge([next(drawn) for _ in each] or [nothing]) for each in self.polygons
        ]
        pixels = mask_util.decode(masks).astype(bool).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(boxes.device)


@PROPOSAL_GENERATOR_REGISTRY.register()
class FastRPN(RPN):
    """Detectron2's :class:`RPN`, for all images of a batch at once where they are on a GPU."""

    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`RPN.label_and_sample_anchors`, which serves on the CPU."""
        on_gpu = anchors[0].device.type == "cuda"
        label = self.label_together if on_gpu else super().label_and_sample_anchors
        return label(anchors, gt_instances)

    @torch.no_grad()
    def label_together(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """:meth:`label_and_sample_anchors`, for which the host waits nowhere."""
        places = Boxes.cat(anchors)
        targets, there = _padded([each.gt_boxes.tensor for each in gt_instances])
        boxes = places.tensor.expand(len(targets), -1, -1)
        matches, labels = match(self.anchor_matcher, targets, there, boxes)
        if self.anchor_boundary_thresh >= 0:
            sizes = [each.image_size for each in gt_instances]
            inside = [places.inside_box(size, self.anchor_boundary_thresh) for size in sizes]
            labels.masked_fill_(~torch.stack(inside), -1)
        fractions = (self.batch_size_per_image, self.positive_fraction)
        positive, negative = sample(labels == 1, labels == 0, *fractions)
        labels.fill_(-1)
        for (chosen, count), label in ((negative, 0), (positive, 1)):
            before = labels.gather(1, chosen)
            labels.scatter_(1, chosen, before.masked_fill(_first(count, chosen.shape[1]), label))
        matched = targets.gather(1, matches[..., None].expand(-1, -1, 4))
        return list(labels), list(matched)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :meth:`RPN.losses`, which here gets the sampled anchors alone, as of one image."""
        labels = torch.stack(gt_labels)
        images, places = (labels >= 0).nonzero(as_tuple=True)
        logits = torch.cat(pred_objectness_logits, dim=1)[images, places]
        deltas = torch.cat(pred_anchor_deltas, dim=1)[images, places]
        boxes = torch.stack(gt_boxes)[images, places]
        sampled = [Boxes.cat(anchors)[places]]
        with EventStorage() as storage:
            losses = super().losses(
                sampled, [logits[None]], [labels[images, places]], [deltas[None]], [boxes]
            )
        for name, (value, _) in storage.latest().items():
            get_event_storage().put_scalar(name, value / len(labels))
        return {name: loss / len(labels) for name, loss in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`RPN.predict_proposals`, which serves on the CPU and in graphs."""
        arguments = (anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        device = pred_anchor_deltas[0].device
        if device.type != "cuda" or is_building_graph():
            return super().predict_proposals(*arguments)
        with torch.autocast(device.type, enabled=False):
            return self.find_proposals(*arguments)

    @torch.no_grad()
    def find_proposals(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """:meth:`predict_proposals`, decoding the best boxes alone and waiting for the host once.

        Raises:
            FloatingPointError: in training, a box or score is not finite.
        """
        most, wanted = (k[self.training] for k in (self.pre_nms_topk, self.post_nms_topk))
        most = min(most, max(level.shape[1] for level in logits))
        found = []
        for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
            scores, best = level_logits.topk(min(most, level_logits.shape[1]), dim=1)  # (N, k)
            chosen = level_deltas.gather(1, best[..., None].expand(-1, -1, 4))
            missing = (0, 0, 0, most - best.shape[1])
            parts = (scores[..., None], chosen, level_anchors.tensor[best])
            found.append([F.pad(part, missing) for part in parts])
        scores, moved, origins = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        boxes = self.box2box_transform.apply_deltas(*(x.flatten(0, 2) for x in (moved, origins)))
        boxes, scores = boxes.view_as(origins), scores[..., 0]
        finite = boxes.isfinite().all(-1) & scores.isfinite()  # (N, L, k)
        limits = torch.tensor(image_sizes).to(boxes, non_blocking=True)  # (N, 2)
        limits = limits[:, None, None].flip(-1).repeat(1, 1, 1, 2)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        valid = finite & (boxes[..., 2:] - boxes[..., :2] > self.min_box_size).all(-1)
        kept = suppress(boxes.flatten(0, 1), valid.flatten(0, 1), self.nms_thresh).view_as(valid)
        scores = scores.masked_fill(~kept, -torch.inf).flatten(1)
        scores, best = scores.topk(min(wanted, scores.shape[1]), dim=1)
        boxes = boxes.flatten(1, 2).gather(1, best[..., None].expand(-1, -1, 4))
        whole, *counts = torch.cat((finite.all()[None], kept.flatten(1).sum(1))).tolist()
        if self.training and not whole:
            raise FloatingPointError(
                "Predicted boxes or scores contain Inf/NaN. Training has diverged."
            )
        return [
            Instances(
                size, proposal_boxes=Boxes(boxes[i, :count]), objectness_logits=scores[i, :count]
            )
            for i, (size, count) in enumerate(zip(image_sizes, counts, strict=True))
        ]


class _LabelsTogether(StandardROIHeads):
    """Heads that label the proposals of all images of a batch at once where they are on a GPU."""

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """See :meth:`ROIHeads.label_and_sample_proposals`, which serves on the CPU."""
        on_gpu = proposals[0].proposal_boxes.device.type == "cuda"
        label = self.label_together if on_gpu else super().label_and_sample_proposals
        return label(proposals, targets)

    @torch.no_grad()
    def label_together(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """:meth:`label_and_sample_proposals`, for which the host waits once."""
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        boxes, are_boxes = _padded([each.proposal_boxes.tensor for each in proposals])
        gt_boxes, are_objects = _padded([each.gt_boxes.tensor for each in targets])
        gt_classes, _ = _padded([each.gt_classes for each in targets])
        matches, labels = match(self.proposal_matcher, gt_boxes, are_objects, boxes)
        labels.masked_fill_(~are_objects.any(1, keepdim=True), 0)  # an image without objects
        classes = gt_classes.gather(1, matches).masked_fill_(labels == 0, self.num_classes)
        classes.masked_fill_((labels == -1) | ~are_boxes, -1)
        is_background = classes == self.num_classes
        fractions = (self.batch_size_per_image, self.positive_fraction)
        positive, negative = sample((classes >= 0) & ~is_background, is_background, *fractions)
        chosen, counts = (torch.cat(parts, dim=1) for parts in zip(positive, negative, strict=True))
        found = matches.gather(1, chosen)
        start = positive[0].shape[1]  # of the negative ones
        labelled = []
        on_host = torch.cat((counts, found), dim=1).tolist()
        for i, (p, n, *matched) in enumerate(on_host):
            picked, target = (
                torch.cat((x[i, :p], x[i, start : start + n])) for x in (chosen, found)
            )
            each = proposals[i][picked]
            each.gt_classes = classes[i, picked]
            fields = targets[i].get_fields().items() if len(targets[i]) else ()
            for name, value in fields:
                if name.startswith("gt_") and not each.has(name):
                    if type(value) is PolygonMasks:  # which lie on the host
                        rows = matched[:p] + matched[start : start + n]
                        each.set(name, FastPolygonMasks([value.polygons[row] for row in rows]))
                    else:
                        each.set(name, value[target])
            labelled.append(each)
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean([row[0] for row in on_host]))
        storage.put_scalar("roi_head/num_bg_samples", np.mean([row[1] for row in on_host]))
        return labelled


@ROI_HEADS_REGISTRY.register()
class FastROIHeads(_LabelsTogether):
    """Detectron2's :class:`StandardROIHeads`, which labels a batch at once on a GPU."""


@ROI_HEADS_REGISTRY.register()
class FastCascadeROIHeads(_LabelsTogether, CascadeROIHeads):
    """Detectron2's :class:`CascadeROIHeads`, which labels a batch at once on a GPU."""


def _first(count: Tensor, size: int) -> Tensor:
    """(N, size), true for as many leading places as the counts, (N, 1), say."""
    return torch.arange(size, device=count.device) < count


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """N tensors (n, …) as one (N, most, …), most at least 1; and (N, most), what is not padding."""
    most = max(1, *(len(row) for row in rows))
    counts = torch.tensor([[len(row)] for row in rows]).to(rows[0].device, non_blocking=True)
    padded = pad_sequence([*rows, rows[0].new_empty(most, *rows[0].shape[1:])], batch_first=True)
    return padded[:-1], _first(counts, most)


def match(matcher: Matcher, targets: Tensor, there: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Detectron2's :class:`Matcher` on the overlaps of several images at once.

    Args:
        matcher: whose thresholds and labels they are.
        targets: (N, n, 4).
        there: (N, n), whether a target is one; an image may have none.
        boxes: (N, m, 4), to match with them.

    Returns:
        tuple[Tensor, Tensor]: (N, m), the target that a box overlaps most, and its label.
    """
    size = max(1, _MAX_PAIRS // (targets.shape[1] * boxes.shape[1]))
    parts = zip(targets.split(size), there.split(size), boxes.split(size), strict=True)
    found = [retry_if_cuda_oom(_match)(matcher, *part) for part in parts]
    # A part for which the GPU's memory did not suffice comes from the CPU.
    matches, labels = (
        torch.cat([part.to(boxes.device) for part in parts]) for parts in zip(*found, strict=True)
    )
    return matches, labels


def _match(
    matcher: Matcher, targets: Tensor, there: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    shared, union = _shared_and_union(targets, boxes)
    overlaps = torch.where(shared > 0, shared / union, 0).masked_fill_(~there[..., None], -1)
    best, matches = overlaps.max(dim=1)
    labels = torch.ones_like(best, dtype=torch.int8)
    bounds = zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True)
    for label, low, high in bounds:
        labels.masked_fill_((best >= low) & (best < high), label)
    if matcher.allow_low_quality_matches:
        is_best = overlaps == overlaps.amax(dim=2, keepdim=True)
        labels.masked_fill_((is_best & there[..., None]).any(1), 1)
    return matches, labels


def sample(
    positive: Tensor, negative: Tensor, number: int, fraction: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Detectron2's `subsample_labels` of several images at once.

    Args:
        positive, negative: (N, m), what there is to choose from.
        number: of all that are chosen of an image, or fewer where there are not as many.
        fraction: of these that may be positive.

    Returns:
        tuple: of the positive and of the negative ones, (N, k) places in random order, and (N, 1)
        how many of these, the leading ones, are chosen.
    """
    order = torch.rand(positive.shape, device=positive.device)
    found, room = [], torch.full_like(order[:, :1], number, dtype=torch.int64)
    for each, most in ((positive, int(number * fraction)), (negative, number)):
        most = min(most, each.shape[1])
        places = order.masked_fill(~each, 1).topk(most, dim=1, largest=False)[1]
        count = each.sum(1, keepdim=True).clamp(max=most).clamp(max=room)
        found.append((places, count))
        room = number - count
    return found[0], found[1]


def suppress(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each of many groups of boxes, without a scan over the boxes.

    A box is kept where no better box that is kept overlaps it by more than the threshold. That rule
    is applied to all boxes at once until nothing changes, which is as often as boxes depend on each
    other in a chain (Cluster-NMS, arXiv 2005.03572), and gives what the scan gives.

    Args:
        boxes: (G, n, 4), in each group the best one first.
        valid: (G, n), whether a box counts.
        threshold: of the overlap.

    Returns:
        Tensor: (G, n), whether a box is kept.
    """
    size = max(1, _MAX_PAIRS // boxes.shape[1] ** 2)
    parts = zip(boxes.split(size), valid.split(size), strict=True)
    return torch.cat([_suppress(*part, threshold) for part in parts])


def _suppress(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    shared, union = _shared_and_union(boxes, boxes)
    # bf16 for its speed: what counts is whether a sum of ones and zeros is 0
    beats = shared.gt_(union.mul_(threshold)).to(torch.bfloat16).triu_(1)
    kept = valid
    while True:
        for _ in range(_STEPS):
            before = kept
            kept = valid & (before.to(beats.dtype)[:, None] @ beats)[:, 0].eq(0)
        if torch.equal(kept, before):
            return kept


def _shared_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(N, n, m), areas of each pair of boxes (N, n, 4) and (N, m, 4), as in `pairwise_iou`."""
    # Each operation after the first writes over an earlier one.
    width, height = (
        torch.minimum(a[:, :, None, i + 2], b[:, None, :, i + 2])
        .sub_(torch.maximum(a[:, :, None, i], b[:, None, :, i]))
        .clamp_(min=0)
        for i in (0, 1)
    )
    shared = width.mul_(height)
    first, second = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    return shared, torch.add(first[:, :, None], second[:, None], out=height).sub_(shared)

"""Parts of Detectron2's detectors with the same parameters and values, in less time on GPUs.

A config chooses them by name: MODEL.PROPOSAL_GENERATOR.NAME "FastRPN", MODEL.ROI_BOX_HEAD.NAME
"FastBoxHead", MODEL.ROI_MASK_HEAD.NAME "FastMaskHead", and "FastLN" as the norm of these heads and
of our pyramids.
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
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

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
        limits = boxes.new_tensor(image_sizes)[:, None, None].flip(-1).repeat(1, 1, 1, 2)
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
    # (G, n, n), of which each operation after the first writes over an earlier one
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = (
        torch.minimum(end[:, :, None], end[:, None])
        .sub_(torch.maximum(start[:, :, None], start[:, None]))
        .clamp_(min=0)
        for start, end in ((x1, x2), (y1, y2))
    )
    shared = width.mul_(height)
    areas = (x2 - x1) * (y2 - y1)
    union = torch.add(areas[:, :, None], areas[:, None], out=height).sub_(shared)
    # bf16 for its speed: what counts is whether a sum of ones and zeros is 0
    beats = shared.gt_(union.mul_(threshold)).to(torch.bfloat16).triu_(1)
    kept = valid
    while True:
        for _ in range(_STEPS):
            before = kept
            kept = valid & (before.to(beats.dtype)[:, None] @ beats)[:, 0].eq(0)
        if torch.equal(kept, before):
            return kept

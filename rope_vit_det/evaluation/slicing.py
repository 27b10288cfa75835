"""Large images in overlapping slices, in the manner of SAHI (arXiv 2202.06934).

SAHI's greedy merging joins whatever overlaps: where objects stand close, boxes of low scores, which
AP counts too, grow over their neighbours. Here only what the border of a slice cut grows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..data.rle_masks import RLEMasks, as_rle, box_of, encode_part, reduced, resized
from ..data.tiles import windows
from ..errors import InputError

_MATCH = 0.5  # of the smaller one's area: from there on, two of a class are one
_BORDER = 0.01  # of a slice's side: what comes so close to its border may be cut by it
_REDUCED = -1  # the number of a look at less pixels than there are: it is less exact
_WHOLE = 1333  # pixels of the longer side of an image that is looked at whole
_NO_INSTANCES = ("SemanticSegmentor", "PanopticFPN", "PanopticDeepLab", "ProposalNetwork")


def check_slice_config(cfg: CfgNode) -> None:
    """Checks that what is found in slices can be merged, where TEST.SLICE is enabled.

    Raises:
        InputError: what the model finds cannot be merged.
    """
    if cfg.TEST.SLICE.ENABLED and cfg.MODEL.META_ARCHITECTURE in _NO_INSTANCES:
        raise InputError(
            "TEST.SLICE.ENABLED merges instances, which MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} does not, or not only, find; set it False"
        )


def find_in_slices(
    image: np.ndarray,
    find: Callable[[np.ndarray], Instances],
    *,
    side: int,
    overlap: float,
    longest: int = 0,
) -> Instances:
    """What a detector finds in the slices of an image and, once more, in the whole of it.

    The whole is reduced to a longer side of `longest`, or of 1333 pixels, where it is larger: so no
    mask of more pixels is ever there, and memory does not grow with the number of objects.

    Args:
        image: (H, W, C) uint8.
        find: from an image to Instances on the CPU, in its size, with `pred_boxes`, `scores`,
            `pred_classes` and, where there are some, `pred_masks` and `pred_keypoints`.
        side: pixels of a slice's side.
        overlap: of neighbours, as a share of the side.

    Returns:
        In the size of the image; `pred_masks` are :class:`RLEMasks`, around which the boxes lie.
        Of objects that are merged, keypoints and what else there is are those of the best one.
    """
    height, width = size = image.shape[:2]
    boxes = windows(size, side, overlap)
    found, looks, are_cut = [], [], []
    for look, (left, top, right, bottom) in enumerate(boxes):
        part = np.ascontiguousarray(image[top:bottom, left:right])
        each = _placed(find(part), left, top, size)
        edges = each.pred_boxes.tensor
        margin = _BORDER * side
        is_cut = (edges[:, 0] < left + margin) & (left > 0)
        is_cut |= (edges[:, 1] < top + margin) & (top > 0)
        is_cut |= (edges[:, 2] > right - margin) & (right < width)
        is_cut |= (edges[:, 3] > bottom - margin) & (bottom < height)
        found.append(each)
        looks += [look] * len(each)
        are_cut += is_cut.tolist()
    if len(boxes) > 1:
        whole = reduced(image, max(longest, side, _WHOLE))
        each = resized(find(np.ascontiguousarray(whole)), size)
        if each.has("pred_masks"):
            each.pred_boxes = _around(each.pred_masks, each.pred_boxes.tensor)
        found.append(each)
        looks += [len(boxes) if whole is image else _REDUCED] * len(each)
        are_cut += [False] * len(each)
    return _merged(Instances.cat(found), np.array(looks), np.array(are_cut, bool))


class SlicedModel(nn.Module):
    """Stands in for a detector in evaluation, and looks at images in slices.

    Its inputs are Detectron2's, but that "image" is (3, H, W) uint8 in the image's own size.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            model: Detectron2's, or with its test-time augmentation, which resizes by itself.
        """
        super().__init__()
        self.model, self.training = model, model.training
        slices, longest = cfg.TEST.SLICE, cfg.INPUT.MAX_SIZE_TEST
        self._options = {"side": slices.SIZE, "overlap": slices.OVERLAP, "longest": longest}
        self._resize: T.Augmentation = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, longest)
        if isinstance(model, GeneralizedRCNNWithTTA):
            self._resize = T.AugmentationList([])

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        images = [each["image"].permute(1, 2, 0).numpy() for each in inputs]
        return [{"instances": find_in_slices(each, self._find, **self._options)} for each in images]

    def _find(self, image: np.ndarray) -> Instances:
        height, width = image.shape[:2]
        resized = T.AugInput(image)
        self._resize(resized)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        item = {"image": tensor, "height": height, "width": width}
        with torch.no_grad():
            return self.model([item])[0]["instances"].to("cpu")


def in_slices(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A :class:`SlicedModel` where TEST.SLICE.ENABLED, else the model."""
    return SlicedModel(cfg, model) if cfg.TEST.SLICE.ENABLED else model


def _placed(found: Instances, left: int, top: int, size: tuple[int, int]) -> Instances:
    """What was found in a slice, in the coordinates of the whole image."""
    result = Instances(size, **found.get_fields())
    offset = torch.tensor([left, top])
    result.pred_boxes = Boxes(found.pred_boxes.tensor + offset.repeat(2))
    if found.has("pred_keypoints"):
        shift = torch.cat((offset, torch.zeros(1)))
        result.pred_keypoints = found.pred_keypoints + shift
    if found.has("pred_masks"):
        parts = (np.asarray(mask) for mask in found.pred_masks)
        result.pred_masks = RLEMasks([encode_part(part, left, top, size) for part in parts], size)
        result.pred_boxes = _around(result.pred_masks, result.pred_boxes.tensor)
    return result


def _around(masks: RLEMasks, boxes: Tensor) -> Boxes:
    """The boxes around masks; an empty mask keeps the box that it has."""
    tight = torch.tensor([box_of(rle) for rle in masks.rles]).reshape(-1, 4).to(boxes.dtype)
    is_empty = (tight[:, 2:] <= tight[:, :2]).any(dim=1, keepdim=True)
    return Boxes(torch.where(is_empty, boxes, tight))


def _merged(found: Instances, looks: np.ndarray, is_cut: np.ndarray) -> Instances:
    """Class by class, the best first: it takes the place of what others saw of it.

    Of equal scores, what a slice shows whole comes first.

    Of one look, nothing is merged: that is the network's to decide. What is whole stays as it is;
    what is cut is joined with what takes its place.
    """
    boxes = found.pred_boxes.tensor.numpy().copy()
    classes, scores = found.pred_classes.numpy(), found.scores.numpy()
    joined: dict[int, list[int]] = {}
    rles = found.pred_masks.rles if found.has("pred_masks") else None
    order = np.lexsort((*boxes.T[[3, 2, 1, 0]], is_cut | (looks == _REDUCED), -scores))
    for number in np.unique(classes):
        left = order[classes[order] == number]
        while len(left):
            best, rest = left[0], left[1:]
            matches = (_overlaps(boxes[best], boxes[rest]) >= _MATCH) & (looks[rest] != looks[best])
            if rles is not None:  # boxes of objects that touch overlap as well
                near = [rles[i] for i in rest[matches]]
                matches[matches] = ~(_mask_overlaps(rles[best], near) < _MATCH)
            joined[best] = rest[matches].tolist() if is_cut[best] else []
            for other in joined[best]:
                boxes[best, :2] = np.minimum(boxes[best, :2], boxes[other, :2])
                boxes[best, 2:] = np.maximum(boxes[best, 2:], boxes[other, 2:])
            left = rest[~matches]
    kept = sorted(joined, key=lambda i: (-scores[i], i))
    result = found[torch.tensor(kept, dtype=torch.int64)]
    result.pred_boxes = Boxes(torch.from_numpy(boxes[kept].reshape(-1, 4)))
    if rles is not None:
        masks = [as_rle(mask_util.merge([rles[j] for j in (i, *joined[i])])) for i in kept]
        result.pred_masks = RLEMasks(masks, found.image_size)
        result.pred_boxes = _around(result.pred_masks, result.pred_boxes.tensor)
    return result


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersections of a box with others, as shares of the smaller one's area."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return shared / np.maximum(np.minimum(np.prod(box[2:] - box[:2]), areas), 1e-9)


def _mask_overlaps(rle: dict[str, Any], rles: list[dict[str, Any]]) -> np.ndarray:
    """The same of masks; NaN where one is empty."""
    if not rles:
        return np.zeros(0)
    # Of a crowd, COCO takes the intersection as a share of the detection alone.
    shares = mask_util.iou([rle], rles, [1] * len(rles)), mask_util.iou(rles, [rle], [1])
    return np.maximum(shares[0][0], shares[1][:, 0])

"""Which detections are right, which are wrong, and what was missed, by COCO's own matching."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

_ALL_AREAS = [0, 1e10]
_MANY = 100_000  # detections of an image and class: all


@dataclass
class ImageMatches:
    """Of one image, at one IoU and least score; what matches a crowd counts neither way.

    Attributes:
        image: its COCO entry.
        found: detections (COCO results) that match an object of their class.
        false: detections that match none.
        missed: annotations that no detection matches.
    """

    image: dict[str, Any]
    found: list[dict[str, Any]] = field(default_factory=list)
    false: list[dict[str, Any]] = field(default_factory=list)
    missed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_mistakes(self) -> int:
        return len(self.false) + len(self.missed)

    @property
    def f1(self) -> float:
        """2 found / (2 found + false + missed); 1 for an image where there is nothing to find."""
        whole = 2 * len(self.found) + self.num_mistakes
        return 2 * len(self.found) / whole if whole else 1.0


def match_images(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    *,
    min_score: float,
    iou: float,
    task: str,
    keypoint_sigmas: Sequence[float] | None = None,
) -> list[ImageMatches]:
    """Matches detections to objects of their class, image by image, the worst images first.

    Args:
        truth: with "iscrowd" and "area", and no id 0: see
            :func:`~rope_vit_det.evaluation.fast.complete_annotations`.
        results: COCO results, of images and categories of `truth`.
        min_score: detections below are left out.
        iou: least overlap of a match.
        task: "bbox", "segm" or "keypoints".
        keypoint_sigmas: none: COCO's.

    Returns:
        The images of `truth`, by F1, and by their number of mistakes where that is equal.
    """
    matches = {number: ImageMatches(image) for number, image in truth.imgs.items()}
    results = [each for each in results if each["score"] >= min_score]
    for pair in _evaluate(truth, results, iou=iou, task=task, keypoint_sigmas=keypoint_sigmas):
        image = matches[pair["image_id"]]
        for number, partner, ignored in _detections(pair):
            if not ignored:
                (image.found if partner else image.false).append(results[number])
        for number, partner, ignored in _objects(pair):
            if not ignored and not partner:
                image.missed.append(truth.anns[number])
    return sorted(matches.values(), key=lambda each: (each.f1, -each.num_mistakes))


def confusion_matrix(
    truth: COCO, results: Sequence[dict[str, Any]], *, min_score: float, iou: float, task: str
) -> np.ndarray:
    """How often objects of a class are detected as another one.

    Detections are matched to objects whatever the class of either, in the order of their scores.

    Args:
        truth, results, min_score, iou, task: see :func:`match_images`.

    Returns:
        (K + 1, K + 1) counts: objects by rows, detections by columns, in the order of the category
        ids; the last row is detections that match nothing, the last column missed objects.
    """
    rows = {number: i for i, number in enumerate(sorted(truth.cats))}
    none = len(rows)
    counts = np.zeros((none + 1, none + 1), np.int64)
    results = [each for each in results if each["score"] >= min_score]
    for pair in _evaluate(truth, results, iou=iou, task=task, use_categories=False):
        for number, partner, ignored in _detections(pair):
            if not ignored:
                row = rows[truth.anns[partner]["category_id"]] if partner else none
                counts[row, rows[results[number]["category_id"]]] += 1
        for number, partner, ignored in _objects(pair):
            if not ignored and not partner:
                counts[rows[truth.anns[number]["category_id"]], none] += 1
    return counts


def _evaluate(
    truth: COCO,
    results: Sequence[dict],
    *,
    iou: float,
    task: str,
    use_categories: bool = True,
    keypoint_sigmas: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """COCOeval's matches of each image (and category)."""
    # With a box, the area of a mask would be that of the box; loading changes what it is given.
    dropped = {"bbox"} if task == "segm" else {"segmentation"}
    copies = [{k: v for k, v in each.items() if k not in dropped} for each in results]
    with redirect_stdout(io.StringIO()):
        found = truth.loadRes(copies) if copies else _no_results(truth)
        evaluation = COCOeval(truth, found, task)
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [_ALL_AREAS], ["all"]
        evaluation.params.maxDets = [_MANY]
        evaluation.params.useCats = int(use_categories)
        if keypoint_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(keypoint_sigmas)
        evaluation.evaluate()
    return [each for each in evaluation.evalImgs if each is not None]


def _no_results(truth: COCO) -> COCO:
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _detections(pair: dict[str, Any]) -> list[tuple[int, int, bool]]:
    """(index in the results, id of the object or 0, is ignored) of each detection."""
    ids = (number - 1 for number in pair["dtIds"])  # loadRes numbers them from 1
    return list(zip(ids, pair["dtMatches"][0].astype(int), pair["dtIgnore"][0], strict=True))


def _objects(pair: dict[str, Any]) -> list[tuple[int, int, bool]]:
    """(id, id of the detection or 0, is ignored) of each object."""
    matches = pair["gtMatches"][0].astype(int)
    return list(zip(pair["gtIds"], matches, pair["gtIgnore"].astype(bool), strict=True))

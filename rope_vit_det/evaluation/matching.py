"""Which detections are right, which are wrong, and what was missed, by COCO's own matching."""

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .fast import as_apis, number

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
        truth: see :func:`~rope_vit_det.data.coco_file.complete_coco`.
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
    objects = truth.dataset["annotations"]
    for pair in _evaluate(truth, results, iou=iou, task=task, keypoint_sigmas=keypoint_sigmas):
        for i, partner in pair.detections:
            image = matches[results[i]["image_id"]]
            (image.false if partner is None else image.found).append(results[i])
        for i in pair.missed:
            matches[objects[i]["image_id"]].missed.append(objects[i])
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
    objects = truth.dataset["annotations"]
    for pair in _evaluate(truth, results, iou=iou, task=task, use_categories=False):
        for i, partner in pair.detections:
            row = none if partner is None else rows[objects[partner]["category_id"]]
            counts[row, rows[results[i]["category_id"]]] += 1
        for i in pair.missed:
            counts[rows[objects[i]["category_id"]], none] += 1
    return counts


class _Pairs(NamedTuple):
    """Of one image (and category), without what counts neither way; indices of what was given.

    Attributes:
        detections: the index of each, and that of its object, or None.
        missed: objects.
    """

    detections: list[tuple[int, int | None]]
    missed: list[int]


def _evaluate(
    truth: COCO,
    results: Sequence[dict],
    *,
    iou: float,
    task: str,
    use_categories: bool = True,
    keypoint_sigmas: Sequence[float] | None = None,
) -> Iterator[_Pairs]:
    numbered = number(truth.dataset, results, task, keypoint_sigmas)
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*as_apis(numbered), task)
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [_ALL_AREAS], ["all"]
        evaluation.params.maxDets = [_MANY]
        evaluation.params.useCats = int(use_categories)
        if keypoint_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(keypoint_sigmas)
        evaluation.evaluate()
    for each in filter(None, evaluation.evalImgs):
        detections = zip(
            each["dtIds"], each["dtMatches"][0].astype(int), each["dtIgnore"][0], strict=True
        )
        objects = zip(each["gtIds"], each["gtMatches"][0], each["gtIgnore"], strict=True)
        yield _Pairs(
            [
                (numbered.kept[i - 1], partner - 1 if partner else None)
                for i, partner, ignored in detections
                if not ignored
            ],
            [i - 1 for i, partner, ignored in objects if not partner and not ignored],
        )

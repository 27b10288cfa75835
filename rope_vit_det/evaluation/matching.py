"""Which detections are right, which are wrong, and what was missed, by COCO's own matching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from .fast import evaluate, with_masks

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
    keypoint_sigmas: Sequence[float] = (),
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
    pairs = _pairs(truth, results, min_score, iou, task, kpt_oks_sigmas=keypoint_sigmas)
    for detection, partner in pairs:
        image = matches[(detection or partner)["image_id"]]
        if detection is None:
            image.missed.append(partner)
        else:
            (image.false if partner is None else image.found).append(detection)
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
    counts = np.zeros((len(rows) + 1, len(rows) + 1), np.int64)
    for detection, partner in _pairs(truth, results, min_score, iou, task, useCats=0):
        row, column = (rows[e["category_id"]] if e else len(rows) for e in (partner, detection))
        counts[row, column] += 1
    return counts


def _pairs(
    truth: COCO, results: Sequence[dict], min_score: float, iou: float, task: str, **params: Any
) -> Iterator[tuple[Any, Any]]:
    """Detections and the objects that they match, None in the place of what is not there.

    Crowds are left out, as is what matches one.
    """
    results = [each for each in results if each["score"] >= min_score]
    results = with_masks(results) if task == "segm" else results
    evaluated = evaluate(
        truth.dataset,
        results,
        task,
        iouThrs=np.array([iou]),
        areaRng=[_ALL_AREAS],
        areaRngLbl=["all"],
        maxDets=[_MANY],
        **params,
    )
    matched = (key.split("_") for key in evaluated.eval["matched"])
    pairs = {int(detection): int(partner) for detection, partner in matched}
    objects = dict(enumerate(truth.dataset["annotations"], start=1))
    ignored = {i for i in objects if evaluated.cocoGt.anns[i]["ignore"]}
    for i, detection in enumerate(results, start=1):
        if pairs.get(i, 0) not in ignored:
            yield detection, objects.get(pairs.get(i, 0))
    for i in objects.keys() - pairs.values() - ignored:
        yield None, objects[i]

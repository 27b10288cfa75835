"""AP of each class and size, and precision over recall."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from .fast import evaluate

_ALL = slice(None)
# The columns of Detectron2's tables: thresholds, of which the mean is taken, and area.
METRICS: dict[str, tuple[int | slice, int]] = {
    "AP": (_ALL, 0),
    "AP50": (0, 0),
    "AP75": (5, 0),
    "APs": (_ALL, 1),
    "APm": (_ALL, 2),
    "APl": (_ALL, 3),
}


@dataclass(frozen=True)
class ClassPrecision:
    """One class, or their mean.

    Attributes:
        values: 0 to 100, by the keys of METRICS; NaN where the ground truth has no such object.
        precision: (10, 101), at IoU 0.50, 0.55, … 0.95 and recall 0, 0.01, … 1; NaN: not defined.
        num_objects: in the ground truth, crowds left out.
    """

    name: str
    values: dict[str, float]
    precision: np.ndarray
    num_objects: int


def class_precisions(
    truth: COCO, results: Sequence[dict[str, Any]], task: str
) -> list[ClassPrecision]:
    """COCO's precision: first the mean over the classes, then each class in the order of its id.

    Args:
        truth, results: see :func:`~rope_vit_det.evaluation.results.read_results`.
        task: "bbox" or "segm".
    """
    counts = Counter(
        each["category_id"] for each in truth.dataset["annotations"] if not each["iscrowd"]
    )
    evaluated = evaluate(truth.dataset, results, task)
    table = np.asarray(evaluated.eval["precision"], float)[..., -1]  # (IoU, recall, class, area)
    table = np.where(table < 0, np.nan, table)
    parts = [("all classes", table, counts.total())]
    for i, number in enumerate(sorted(truth.cats)):
        parts.append((truth.cats[number]["name"], table[:, :, [i]], counts[number]))
    return [
        ClassPrecision(name, _values(part), _mean(part[..., 0], axis=2), count)
        for name, part, count in parts
    ]


def _values(table: np.ndarray) -> dict[str, float]:
    """Of (IoU, recall, class, area)."""
    parts = {name: table[thresholds, :, :, area] for name, (thresholds, area) in METRICS.items()}
    return {name: float(_mean(part.reshape(-1), axis=0)) * 100 for name, part in parts.items()}


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Without the NaNs; NaN where there is nothing else."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.nanmean(values, axis=axis)

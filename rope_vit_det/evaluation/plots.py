"""Pictures of a run: its losses and AP over the iterations, and what the detector finds."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure

_PANEL_HEIGHT = 480  # pixels
_CAPTION_HEIGHT = 44
_GAP = 12


def plot_curves(metrics_json: str | os.PathLike, out: str | os.PathLike) -> None:
    """Draws every loss, the learning rate and every AP that a run logged.

    Args:
        metrics_json: what Detectron2's `JSONWriter` left, a JSON object a line.
        out: the PNG to write.
    """
    with open(metrics_json, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    losses = sorted({key for row in rows for key in row if "loss" in key})
    precisions = sorted({key for row in rows for key in row if key.rpartition("/")[2] == "AP"})

    figure = Figure(figsize=(12, 4.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for key in losses:
        is_total = key == "total_loss"
        left.plot(
            *_series(rows, key),
            label=key.replace("_", " "),
            linewidth=2.2 if is_total else 1.3,
            color="black" if is_total else None,
        )
    left.set(title="Losses", xlabel="iteration", ylim=(0, None))
    left.legend()
    for key in precisions:
        task = key.rpartition("/")[0]
        right.plot(*_series(rows, key), marker="o", label={"bbox": "box", "segm": "mask"}.get(task))
    right.set(title="AP (IoU 0.50:0.95) on held-out images", xlabel="iteration", ylim=(0, None))
    if precisions:
        right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, None)
    figure.savefig(out)


def draw_predictions(
    images: Sequence[Mapping[str, Any]],
    predictions: Sequence[Instances],
    metadata: Metadata,
    out: str | os.PathLike,
    *,
    min_score: float = 0.5,
) -> None:
    """Draws ground truth (left) beside predictions (right), one image a row.

    Args:
        images: Detectron2 dataset dicts with annotations.
        predictions: a detector's output for each, in the image's own size.
        metadata: of the dataset, for the class names.
        out: the PNG to write.
        min_score: predictions below are not drawn.
    """
    rows = []
    for image, found in zip(images, predictions, strict=True):
        pixels = cv2.imread(image["file_name"])[..., ::-1]
        scale = _PANEL_HEIGHT / pixels.shape[0]
        truth = Visualizer(pixels, metadata, scale=scale).draw_dataset_dict(dict(image))
        shown = found[found.scores >= min_score]
        guess = Visualizer(pixels, metadata, scale=scale).draw_instance_predictions(shown)
        rows.append((truth.get_image(), guess.get_image()))
    width = max(panel.shape[1] for row in rows for panel in row)
    sheet = np.concatenate(
        [
            np.concatenate((_caption("ground truth", width), _caption("predictions", width)), 1),
            *(np.concatenate([_pad(panel, width) for panel in row], axis=1) for row in rows),
        ]
    )
    cv2.imwrite(os.fspath(out), sheet[..., ::-1])


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]


def _pad(panel: np.ndarray, width: int) -> np.ndarray:
    free = width - panel.shape[1]
    sides = (_GAP + free // 2, _GAP + free - free // 2)
    return np.pad(panel, ((0, _GAP), sides, (0, 0)), constant_values=255)


def _caption(text: str, width: int) -> np.ndarray:
    panel = np.full((_CAPTION_HEIGHT, width + 2 * _GAP, 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.9
    (text_width, text_height), _ = cv2.getTextSize(text, font, scale, 2)
    origin = ((panel.shape[1] - text_width) // 2, (_CAPTION_HEIGHT + text_height) // 2)
    return cv2.putText(panel, text, origin, font, scale, (0, 0, 0), 2, cv2.LINE_AA)

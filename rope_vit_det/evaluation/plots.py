"""Pictures of a run: its losses and AP over the iterations, and what the detector finds."""

import colorsys
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.figure import Figure

# Pixels; an image is enlarged until it meets one of the two.
_PANEL_WIDTH, _PANEL_HEIGHT = 440, 400
_CAPTION_HEIGHT = 44
_GAP = 8
_PAIRS_A_ROW = 2


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
    """Draws ground truth (left) beside predictions (right), two images a row.

    Args:
        images: Detectron2 dataset dicts with annotations.
        predictions: a detector's output for each, in the image's own size.
        metadata: of the dataset, for the class names.
        out: the PNG to write.
        min_score: predictions below are not drawn.
    """
    metadata = _with_colours(metadata)
    pairs = []
    for image, found in zip(images, predictions, strict=True):
        pixels = cv2.imread(image["file_name"])[..., ::-1]
        scale = min(_PANEL_WIDTH / pixels.shape[1], _PANEL_HEIGHT / pixels.shape[0])

        def canvas(pixels: np.ndarray = pixels, scale: float = scale) -> Visualizer:
            return Visualizer(pixels, metadata, scale, instance_mode=ColorMode.SEGMENTATION)

        truth = canvas().draw_dataset_dict(dict(image))
        guess = canvas().draw_instance_predictions(found[found.scores >= min_score])
        pairs.append((truth.get_image(), guess.get_image()))
    columns = min(_PAIRS_A_ROW, len(pairs))
    captions = [_caption(text) for text in ("ground truth", "predictions")]
    sheet = [np.concatenate(captions * columns, axis=1)]
    for start in range(0, len(pairs), columns):
        row = [panel for pair in pairs[start : start + columns] for panel in pair]
        row += [np.full((1, 1, 3), 255, np.uint8)] * (2 * columns - len(row))
        height = max(panel.shape[0] for panel in row)
        sheet.append(np.concatenate([_pad(panel, height) for panel in row], axis=1))
    cv2.imwrite(os.fspath(out), np.concatenate(sheet)[..., ::-1])


def _with_colours(metadata: Metadata) -> Metadata:
    """The same metadata with a colour a class, so that truth and prediction of it look alike."""
    if metadata.get("thing_colors", None):
        return metadata
    classes = metadata.thing_classes
    hues = np.arange(len(classes)) / max(len(classes), 1)
    colours = [[round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 0.95)] for hue in hues]
    return Metadata(thing_classes=classes, thing_colors=colours)


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]


def _pad(panel: np.ndarray, height: int) -> np.ndarray:
    free = (height - panel.shape[0], _PANEL_WIDTH - panel.shape[1])
    rows = (free[0] // 2, _GAP + free[0] - free[0] // 2)
    columns = (_GAP + free[1] // 2, _GAP + free[1] - free[1] // 2)
    return np.pad(panel, (rows, columns, (0, 0)), constant_values=255)


def _caption(text: str) -> np.ndarray:
    panel = np.full((_CAPTION_HEIGHT, _PANEL_WIDTH + 2 * _GAP, 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.9
    (text_width, text_height), _ = cv2.getTextSize(text, font, scale, 2)
    origin = ((panel.shape[1] - text_width) // 2, (_CAPTION_HEIGHT + text_height) // 2)
    return cv2.putText(panel, text, origin, font, scale, (0, 0, 0), 2, cv2.LINE_AA)

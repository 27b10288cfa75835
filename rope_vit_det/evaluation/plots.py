"""The curves of a run: its losses and AP over the iterations."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError

_TOTAL: dict[str, Any] = {"linewidth": 2.2, "color": "black"}


def plot_curves(metrics_json: str | os.PathLike, out: str | os.PathLike) -> None:
    """Draws every loss and every AP that a run logged.

    Args:
        metrics_json: what Detectron2's `JSONWriter` left, a JSON object a line.
        out: the PNG to write.
    """
    rows = read_metrics(metrics_json)
    figure = Figure(figsize=(12, 4.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, rows)
    draw_precisions(right, rows)
    figure.savefig(out)


def read_metrics(metrics_json: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a metrics.json.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        with open(metrics_json, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise InputError(f"{metrics_json}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{metrics_json} is not JSON, an object a line: {error}") from None
    if not all(isinstance(row, dict) and "iteration" in row for row in rows):
        raise InputError(f"{metrics_json} is not what a training logs: a row has no iteration")
    return rows


def draw_losses(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """Every loss over the iterations."""
    for key in sorted({key for row in rows for key in row if "loss" in key}):
        style = _TOTAL if key == "total_loss" else {"linewidth": 1.3}
        axes.plot(*_series(rows, key), label=key.replace("_", " "), **style)
    _finish(axes, "Losses")


def draw_precisions(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    """Every AP over the iterations."""
    for key in sorted({key for row in rows for key in row if key.rpartition("/")[2] == "AP"}):
        *dataset, task = key.split("/")[:-1]  # of several datasets
        label = " ".join(["/".join(dataset), {"bbox": "box", "segm": "mask"}.get(task, task)])
        axes.plot(*_series(rows, key), marker="o", label=label.strip())
    _finish(axes, "AP (IoU 0.50:0.95) on held-out images")


def _finish(axes: Axes, title: str) -> None:
    # An AP is NaN where nothing was found.
    tops = (float(np.nanmax(line.get_ydata(), initial=0)) for line in axes.lines)
    highest = max(tops, default=0.0)
    # A single point sets no range by itself.
    axes.set(title=title, xlabel="iteration", ylim=(0, 1.08 * highest or 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]

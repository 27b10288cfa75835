"""The curves of a run: its losses and AP over the iterations."""

import json
import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


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


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]

"""Charts of a report, as SVG to stand in a page; wide enough for a phone, not wider."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.precision import ClassPrecision

_SIZE = (5.2, 3.6)  # inches
_RECALLS = np.linspace(0, 1, 101)
_MAX_LINES = 10
_THRESHOLDS = {0: "0.50", 5: "0.75", 8: "0.90"}
MAX_CLASSES = 20


def chart(draw: Callable[..., None], *data: Any, size: tuple[float, float] = _SIZE) -> str:
    """What a function draws of data into axes, as an SVG element with text that can be searched."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), *data)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page sets the width; without metadata, nothing in it names an address on the network.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)


def draw_precision_over_recall(axes: Axes, precisions: Sequence[ClassPrecision]) -> None:
    """At IoU 0.50 of each class, or the ten most frequent, and at three IoUs of their mean."""
    whole, *classes = precisions
    shown = sorted(classes, key=lambda each: -each.num_objects)[:_MAX_LINES]
    for each in shown if len(classes) > 1 else ():
        axes.plot(_RECALLS, each.precision[0], linewidth=1.2, label=each.name)
    for i, style in zip(_THRESHOLDS, ("-", "--", ":"), strict=True):
        label = f"{whole.name}, IoU {_THRESHOLDS[i]}"
        axes.plot(_RECALLS, whole.precision[i], style, color="black", linewidth=2, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def draw_confusion(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """A map of :func:`~rope_vit_det.evaluation.matching.confusion_matrix`.

    Colours are shares of a row. Of more than MAX_CLASSES classes, those with most mistakes.
    """
    keep = _most_mistaken(counts)
    part = counts[np.ix_(keep, keep)]
    share = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [names[i] if i < len(names) else None for i in keep]
    ticks = range(len(keep))
    axes.set_xticks(ticks, [label or "missed" for label in labels], rotation=60, ha="right")
    axes.set_yticks(ticks, [label or "nothing" for label in labels])
    axes.set(xlabel="detected as", ylabel="object")
    if len(keep) <= _MAX_LINES + 1:
        for row, column in zip(*part.nonzero(), strict=True):
            colour = "white" if share[row, column] > 0.6 else "black"
            count = str(part[row, column])
            axes.text(column, row, count, ha="center", va="center", color=colour)


def _most_mistaken(counts: np.ndarray) -> list[int]:
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    worst = np.argsort(-mistakes[:-1], kind="stable")[:MAX_CLASSES]
    return [*sorted(worst.tolist()), len(counts) - 1]

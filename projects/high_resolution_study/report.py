"""A study's results as a table and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

_SETTING = ("attention", "positions", "table")
_COLOURS = {
    ("global", "counting"): "tab:blue",
    ("global", "mapped"): "tab:cyan",
    ("windowed", "counting"): "tab:red",
    ("windowed", "mapped"): "tab:orange",
}
_LINES = {"interpolated": "-", "tiled": "--"}


def write_report(results: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Leaves results.json, table.md and plot.png in a folder.

    Args:
        results: of :func:`~projects.high_resolution_study.study.run_study`.

    Returns:
        The table, in Markdown.
    """
    (folder / "results.json").write_text(json.dumps(list(results), indent=1) + "\n")
    table = format_table(results)
    (folder / "table.md").write_text(table + "\n")
    plot(results, folder / "plot.png")
    return table


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Box AP, a row for each setting and a column for each scale, frozen before fine-tuned.

    With several seeds, the mean ± half the range.
    """
    scales = list(dict.fromkeys(result["scale"] for result in results))
    cells = {(_row(result), result["scale"]): _format(result["AP"]) for result in results}
    rows = [
        [*row, *(cells[row, scale] for scale in scales)]
        for row in dict.fromkeys(map(_row, results))
    ]
    headers = ["", *_SETTING, *(f"{scale:g}×" for scale in scales)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def plot(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws AP over the scale, frozen beside fine-tuned, a line for each setting.

    Args:
        out: the PNG to write.
    """
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, fine_tuned in zip(panels, (False, True), strict=True):
        here = [result for result in results if result["fine_tuned"] == fine_tuned]
        for row in dict.fromkeys(map(_row, here)):
            line = [result for result in here if _row(result) == row]
            scales = [result["scale"] for result in line]
            attention, positions, table = row[1:]
            style = {"color": _COLOURS[attention, positions], "linestyle": _LINES[table]}
            label = f"{attention}, {positions}, {table}"
            axes.plot(scales, [mean(r["AP"]) for r in line], marker="o", label=label, **style)
            axes.fill_between(
                scales,
                [min(result["AP"]) for result in line],
                [max(result["AP"]) for result in line],
                color=style["color"],
                alpha=0.08,
                linewidth=0,
            )
        axes.set(
            title="fine-tuned at that scale" if fine_tuned else "as trained at scale 1",
            xlabel="image side, relative to the training's",
            xticks=scales,
            ylim=(0, None),
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("box AP (IoU 0.50:0.95)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(out)


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    training = "fine-tuned" if result["fine_tuned"] else "frozen"
    return (training, *(result[key] for key in _SETTING))


def _format(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"

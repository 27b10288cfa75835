"""AP by iterations and by minutes, as one table and one plot."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from projects.versus_vitdet.run import TASKS, Run

_TASK = {"bbox": "box", "segm": "mask"}


def write_report(runs: Sequence[Run], folder: Path) -> str:
    """Leaves results.json, table.md and plot.png in a folder.

    Returns:
        The table, in Markdown.
    """
    (folder / "results.json").write_text(json.dumps([r._asdict() for r in runs], indent=1) + "\n")
    table = format_table(runs)
    (folder / "table.md").write_text(table + "\n")
    plot(runs, folder / "plot.png")
    return table


def format_table(runs: Sequence[Run]) -> str:
    """Mean AP over the seeds ± half the range, after as many iterations and as many minutes."""
    networks = list(dict.fromkeys(run.network for run in runs))
    marks = runs[0].iterations
    rows = [_row(f"{mark} iterations", mark, runs, "iterations") for mark in marks]
    # What every run has reached; whole minutes.
    last = int(min(run.minutes[-1] for run in runs))
    rows += [_row(f"{mark} min", mark, runs, "minutes") for mark in range(1, last + 1)]
    means = [np.mean([r.minutes[-1] for r in runs if r.network == name]) for name in networks]
    whole = "; ".join(f"{n}: {m:.1f} min" for n, m in zip(networks, means, strict=True))
    headers = ["after", *(f"{name}, {_TASK[task]} AP" for task in TASKS for name in networks)]
    note = f"Mean of {len(runs) // len(networks)} seeds ± half the range. Training took, {whole}."
    return f"{note}\n\n" + tabulate(rows, headers, "github", disable_numparse=True)


def plot(runs: Sequence[Run], out: Path) -> None:
    """Draws AP over iterations and over minutes, a line a network, the range of its seeds behind.

    Args:
        out: the PNG to write.
    """
    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    networks = list(dict.fromkeys(run.network for run in runs))
    for row, task in zip(panels, TASKS, strict=True):
        for panel, axis in zip(row, ("iterations", "minutes"), strict=True):
            for network, colour in zip(networks, ("tab:red", "tab:blue"), strict=True):
                own = [run for run in runs if run.network == network]
                end = min(getattr(run, axis)[-1] for run in own)
                places = np.linspace(0, end, 200)
                values = np.array([_at(run, axis, task, places) for run in own])
                panel.plot(places, values.mean(0), color=colour, label=network)
                panel.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.2)
            panel.set(xlabel=axis, xlim=(0, None), ylim=(0, None))
            panel.grid(alpha=0.3)
        row[0].set(ylabel=f"{_TASK[task]} AP")
    panels[0, 0].legend()
    figure.savefig(out)


def _row(title: str, mark: float, runs: Sequence[Run], axis: str) -> list[str]:
    cells = [title]
    for task in TASKS:
        for network in dict.fromkeys(run.network for run in runs):
            values = [_at(run, axis, task, mark) for run in runs if run.network == network]
            cells.append(f"{np.mean(values):.1f} ± {np.ptp(values) / 2:.1f}")
    return cells


def _at(run: Run, axis: str, task: str, places: float | np.ndarray) -> np.ndarray:
    """AP, between evaluations on a straight line, from 0 at the start."""
    return np.interp(places, [0, *getattr(run, axis)], [0, *run.precisions[task]])

"""From a training's OUTPUT_DIR to its report."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from pycocotools.coco import COCO

from ..config.run_config import read_run_config
from ..data.own import register_own_data
from ..engine.run_folder import RECORD_FILE
from ..errors import InputError
from ..evaluation.matching import ImageMatches, confusion_matrix, match_images
from ..evaluation.plots import draw_losses, draw_precisions, read_metrics
from ..evaluation.precision import METRICS, ClassPrecision, class_precisions
from ..evaluation.results import find_task, read_results, read_truth, registered_files
from ..utils.atomic_files import new_file
from ..visualization.worst_images import draw_images
from .charts import MAX_CLASSES, chart, confusion, precision_over_recall
from .page import facts, figure, folded, grid, note, page, picture, section, table

RESULTS = Path("inference", "coco_instances_results.json")
_MIN_SCORE, _IOU = 0.5, 0.5  # of the confusion and the pictures
_NUM_WORST, _NUM_BEST = 6, 3
_MAX_CONFUSIONS = 10
_PACKAGES = ("torch", "detectron2", "rope-vit-det")
_MEMORY = re.compile(r"Peak memory: (\d+) MiB")
_SPEED = re.compile(r"pure compute time: .*?\(([\d.]+) s / iter per device, on (\d+) devices\)")


def write_report(output_dir: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Writes what a training did, and how good its detector is, into one HTML file.

    Args:
        output_dir: with the config.yaml and metrics.json that a training left and, of one that was
            evaluated in COCO's format, the results in inference/.
        out: the file; None: report.html in the folder.

    Returns:
        The file.

    Raises:
        InputError: the folder is not a training's; the ground truth or its images are missing, or
            belong to other results. Nothing was written.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the OUTPUT_DIR of a training")
    cfg, file = read_run_config(folder)
    rows = read_metrics(folder / "metrics.json")
    sections = [
        section("The run", facts(_run_facts(cfg, folder, rows))),
        section("Curves", *_curves(rows)),
        *_evaluation(cfg, folder),
        section("Config", folded("config.yaml", file.read_text("utf-8"))),
    ]
    out = folder / "report.html" if out is None else Path(out)
    with new_file(out, force=True) as temporary:
        temporary.write_text(page(f"{folder.resolve().name}: training report", sections), "utf-8")
    return out


def _run_facts(
    cfg: CfgNode, folder: Path, rows: Sequence[Mapping[str, float]]
) -> list[tuple[str, str]]:
    record = _last_line(folder / RECORD_FILE)
    versions = record.get("versions", {})
    made = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    if record:
        made.insert(0, f"Python {record['python']}")
    solver, net = cfg.SOLVER, cfg.MODEL.ROPE_VIT
    window = f"windows of {net.WINDOW_SIZE}" if net.WINDOW_SIZE else "global attention"
    # The last evaluation is logged one iteration behind the training.
    done = min(_last(rows, "iteration", -1) + 1, solver.MAX_ITER)
    found = [
        ("Detector", f"{cfg.MODEL.META_ARCHITECTURE} on {net.NAME}, {window}"),
        ("Began with", cfg.MODEL.WEIGHTS or "random weights"),
        ("Trained on", ", ".join(cfg.DATASETS.TRAIN)),
        ("Evaluated on", ", ".join(cfg.DATASETS.TEST) or "nothing"),
        ("Iterations", f"{done:.0f} of {solver.MAX_ITER}"),
        ("Batch, learning rate", f"{solver.IMS_PER_BATCH} images, {solver.BASE_LR:g}"),
        ("Device", cfg.MODEL.DEVICE),
        ("Started", record.get("time", "")),
        ("Seed", str(record.get("seed", cfg.SEED))),
        ("Git revision", record.get("git_revision") or ""),
        ("Versions", ", ".join(made)),
        *_costs(folder, rows, cfg.MODEL.DEVICE),
    ]
    return [(name, value) for name, value in found if value]


def _costs(folder: Path, rows: Sequence[Mapping[str, float]], device: str) -> list[tuple[str, str]]:
    """Timings and memory, as far as they were logged."""
    found = []
    times = [row["time"] for row in rows if "time" in row]
    if times:
        waiting = median(row["data_time"] for row in rows if "data_time" in row)
        found.append(
            ("Training step", f"{median(times):.3f} s, {waiting:.3f} s of it waiting for data")
        )
    log = folder / "log.txt"
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    speeds = _SPEED.findall(text)
    if speeds:
        seconds, devices = speeds[-1]
        found.append(("Inference", f"{float(seconds):.3f} s an image, on {devices} device(s)"))
    peaks = _MEMORY.findall(text)
    if peaks:
        what = "GPU memory" if device.startswith("cuda") else "memory of the process"
        found.append(("Peak memory", f"{peaks[-1]} MiB ({what}, training)"))
    return found


def _curves(rows: Sequence[Mapping[str, float]]) -> list[str]:
    charts = [figure(chart(partial(draw_losses, rows=rows)))]
    if any(key.endswith("/AP") for row in rows for key in row):
        charts.append(figure(chart(partial(draw_precisions, rows=rows))))
    return [grid(charts)]


def _evaluation(cfg: CfgNode, folder: Path) -> list[str]:
    file = folder / RESULTS
    if not file.is_file():
        return [section("Evaluation", note(f"There are no results: no {RESULTS}."))]
    if not cfg.DATASETS.TEST:
        raise InputError(f"{file} is there, but DATASETS.TEST of the config is empty")
    register_own_data(cfg)
    # Of several datasets, Detectron2 leaves the results of the last.
    json_file, images = registered_files(cfg.DATASETS.TEST[-1])
    truth = read_truth(json_file)
    results, _ = read_results(file, truth)
    task = find_task(results, truth)
    # Before the matching, which turns polygons into bitmaps.
    tasks = {"bbox": "boxes", "segm": "masks"} if task == "segm" else {"bbox": "boxes"}
    precisions = {each: class_precisions(truth, results, each) for each in tasks}
    options = {"min_score": _MIN_SCORE, "iou": _IOU, "task": task}
    counts = confusion_matrix(truth, results, **options)
    matches = match_images(truth, results, **options)
    return [
        section(
            "AP by class and size",
            note(
                "COCO's AP in percent: s under 32x32 pixels, m up to 96x96, l above; – where there "
                "is no such object. n: objects."
            ),
            grid(
                [
                    f"<div><h3>{tasks[each]}</h3>{_ap_table(precisions[each])}</div>"
                    for each in tasks
                ]
            ),
        ),
        section(
            "Precision over recall",
            grid(
                [
                    figure(chart(precision_over_recall(precisions[each])), f"{tasks[each]}")
                    for each in tasks
                ]
            ),
        ),
        _confusion_section(truth, counts, tasks[task]),
        *_picture_sections(truth, matches, images, task),
    ]


def _ap_table(precisions: Sequence[ClassPrecision]) -> str:
    rows = [
        [
            each.name,
            *("–" if np.isnan(each.values[key]) else f"{each.values[key]:.1f}" for key in METRICS),
            str(each.num_objects),
        ]
        for each in precisions
    ]
    return table(["class", *METRICS, "n"], rows, first_is_whole=True)


def _confusion_section(truth: COCO, counts: np.ndarray, what: str) -> str:
    names = [truth.cats[number]["name"] for number in sorted(truth.cats)]
    wrong = counts[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
    rows = [[f"{names[i]} as {names[j]}", str(wrong[i, j])] for i, j in pairs]
    side = min(7.5, max(4.2, 0.32 * min(len(names), MAX_CLASSES)))
    text = f"{what.capitalize()} of score {_MIN_SCORE} or more, matched to objects of any class at "
    text += f"IoU {_IOU}."
    if len(names) > MAX_CLASSES:
        text += f" The {MAX_CLASSES} classes with most mistakes of {len(names)}."
    parts = [figure(chart(confusion(counts, names), (side, side)))]
    if rows:
        parts.append(table(["most confused", "times"], rows, first_is_whole=False))
    return section("Confusion between classes", note(text), grid(parts))


def _picture_sections(
    truth: COCO, matches: list[ImageMatches], folder: str, task: str
) -> list[str]:
    legend = note(
        f"Found in green, false in orange, missed in blue; score {_MIN_SCORE} or more, IoU {_IOU}."
    )
    worst = matches[:_NUM_WORST]
    rest = sorted(matches[_NUM_WORST:], key=lambda each: (-each.f1, -len(each.found)))
    sections = []
    for heading, chosen in (("Worst", worst), ("Best", rest[:_NUM_BEST])):
        pictures = draw_images(chosen, folder, truth.cats, masks=task == "segm")
        figures = [
            figure(picture(pixels, each.image["file_name"]))
            for each, pixels in zip(chosen, pictures, strict=True)
        ]
        if figures:
            sections.append(section(f"{heading} held-out images", legend, grid(figures)))
    return sections


def _last(rows: Sequence[Mapping[str, float]], key: str, default: float) -> float:
    return next((row[key] for row in reversed(rows) if key in row), default)


def _last_line(path: Path) -> dict[str, Any]:
    """The last JSON object of a file with one a line; empty where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}

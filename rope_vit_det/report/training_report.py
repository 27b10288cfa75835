"""From a training's OUTPUT_DIR to its report."""

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from jinja2 import Template
from PIL import Image
from pycocotools.coco import COCO

from ..config.keys import with_settings
from ..config.run_config import read_run_config
from ..data.own import register_own_data
from ..engine.run_folder import RECORD_FILE
from ..errors import InputError
from ..evaluation.evaluators import results_folder
from ..evaluation.fast import TRUTH_FILE
from ..evaluation.matching import ImageMatches, confusion_matrix, match_images
from ..evaluation.plots import draw_losses, draw_precisions, read_metrics
from ..evaluation.precision import METRICS, class_precisions
from ..evaluation.results import find_task, read_results, read_truth, registered_files
from ..utils.atomic_files import new_file
from ..visualization.worst_images import draw_images
from .charts import MAX_CLASSES, chart, draw_confusion, draw_precision_over_recall

RESULTS = "coco_instances_results.json"
_MIN_SCORE, _IOU = 0.5, 0.5  # of the confusion and the pictures
_NUM_WORST, _NUM_BEST = 6, 3
_MAX_CONFUSIONS = 10
_QUALITY = 80  # of JPEGs
_PACKAGES = ("Python", "torch", "detectron2", "rope-vit-det")
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
    record = _last_training(folder / RECORD_FILE)
    made = {"Python": record.get("python"), **record.get("versions", {})} if record else {}
    curves = [chart(draw_losses, rows)]
    if any(key.endswith("/AP") for row in rows for key in row):
        curves.append(chart(draw_precisions, rows))
    register_own_data(cfg)
    here = with_settings(cfg, {"OUTPUT_DIR": str(folder)})  # the folder may have been moved
    template = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    text = Template(template, autoescape=True).render(
        title=f"{folder.resolve().name}: training report",
        cfg=cfg,
        record=record,
        versions=", ".join(f"{name} {made[name]}" for name in _PACKAGES if name in made),
        # The last evaluation is logged one iteration behind the training.
        done=min(max((row["iteration"] for row in rows), default=-1) + 1, cfg.SOLVER.MAX_ITER),
        costs=_costs(folder, rows),
        curves=curves,
        evaluations={
            name: _evaluation(name, Path(results_folder(here, name))) for name in cfg.DATASETS.TEST
        },
        config=file.read_text("utf-8"),
        results_file=RESULTS,
        min_score=_MIN_SCORE,
        iou=_IOU,
        max_classes=MAX_CLASSES,
    )
    out = folder / "report.html" if out is None else Path(out)
    with new_file(out, force=True) as temporary:
        temporary.write_text(text, "utf-8")
    return out


def _costs(folder: Path, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Timings and memory, as far as they were logged."""
    log = folder / "log.txt"
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    steps = ((row["time"], row.get("data_time", 0)) for row in rows if "time" in row)
    return {
        "step": [median(seconds) for seconds in zip(*steps, strict=True)],
        "inference": _SPEED.findall(text)[-1:],
        "memory": _MEMORY.findall(text)[-1:],
    }


def _evaluation(name: str, folder: Path) -> dict[str, Any]:
    """What the template shows of the results of a dataset; nothing where there are none."""
    if not (folder / RESULTS).is_file():
        return {}
    own_truth = folder / TRUTH_FILE
    if own_truth.is_file() and MetadataCatalog.get(name).get("json_file", None) is None:
        json_file, images = str(own_truth), ""
    else:
        json_file, images = registered_files(name)
    truth = read_truth(json_file)
    results, _ = read_results(folder / RESULTS, truth)
    task = find_task(results, truth)
    # Before the matching, which turns polygons into bitmaps.
    tasks = {"bbox": "boxes", "segm": "masks"} if task == "segm" else {"bbox": "boxes"}
    precisions = {what: class_precisions(truth, results, each) for each, what in tasks.items()}
    counts = confusion_matrix(truth, results, min_score=_MIN_SCORE, iou=_IOU, task=task)
    matches = match_images(truth, results, min_score=_MIN_SCORE, iou=_IOU, task=task)
    rest = sorted(matches[_NUM_WORST:], key=lambda each: (-each.f1, -len(each.found)))
    chosen = {"Worst": matches[:_NUM_WORST], "Best": rest[:_NUM_BEST]}
    names = [truth.cats[number]["name"] for number in sorted(truth.cats)]
    side = min(7.5, max(4.2, 0.32 * min(len(names), MAX_CLASSES)))
    return {
        "task": tasks[task],
        "metrics": METRICS,
        "precisions": precisions,
        "recalls": {
            what: chart(draw_precision_over_recall, each) for what, each in precisions.items()
        },
        "num_classes": len(names),
        "confusion": chart(draw_confusion, counts, names, size=(side, side)),
        "confused": _most_confused(counts, names),
        "pictures": {
            heading: _pictures(some, images, truth, task) for heading, some in chosen.items()
        },
    }


def _most_confused(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, int]]:
    wrong = counts[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
    return [(f"{names[i]} as {names[j]}", wrong[i, j]) for i, j in pairs]


def _pictures(
    matches: list[ImageMatches], folder: str, truth: COCO, task: str
) -> list[tuple[str, str]]:
    """File names and JPEGs, in base64."""
    pictures = []
    drawn = draw_images(matches, folder, truth.cats, masks=task == "segm")
    for each, pixels in zip(matches, drawn, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
        pictures.append((each.image["file_name"], base64.b64encode(file.getvalue()).decode()))
    return pictures


def _last_training(path: Path) -> dict[str, Any]:
    """The last line of a record of starts that is no evaluation's; empty where there is none."""
    try:
        starts = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    return next((each for each in reversed(starts) if not each.get("eval_only")), {})

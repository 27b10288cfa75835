"""The demo: a small dataset, a short training on whatever machine is there, and its pictures."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from .data.demo.dataset import demo_dataset_root, generate_demo_dataset
from .engine.command_line import argument_parser
from .engine.main import run
from .engine.run_folder import describe_output
from .engine.setup import check_settings, load_config
from .evaluation.plots import plot_curves, read_metrics
from .prediction import Predictor
from .report import write_report
from .visualization.predictions import draw_predictions

NUM_PICTURES = 6


def run_demo(config_file: str, opts: Sequence[str] = ()) -> None:
    """Generates the dataset, trains and evaluates a detector, draws predictions, writes a report.

    What an earlier run left in OUTPUT_DIR is moved aside, as with --overwrite of the training tool.

    Args:
        config_file: the yaml of the demo.
        opts: KEY VALUE pairs over the config.

    Raises:
        InputError: for a wrong config.
    """
    args = argument_parser().parse_args(["--config-file", config_file, "--overwrite", *opts])
    cfg = load_config(args)
    check_settings(cfg)
    root = demo_dataset_root()
    _step(1, f"a dataset of drawn objects, in {root}")
    generate_demo_dataset(root)

    _step(2, f"training for {cfg.SOLVER.MAX_ITER} iterations, then evaluation")
    run(args)

    output = Path(cfg.OUTPUT_DIR)
    _step(3, "drawing curves and predictions, writing the report")
    plot_curves(output / "metrics.json", output / "curves.png")
    _draw_held_out_images(cfg, output / "predictions.png")
    report = write_report(output)

    _step(4, "done")
    print(_ap_table(read_metrics(output / "metrics.json")))
    print(f"\n{describe_output(cfg.OUTPUT_DIR)}")
    print(f"\nOpen it in a browser: {report.resolve()}")


def _step(number: int, what: str) -> None:
    print(f"\n=== [{number}/4] {what}", flush=True)


def _draw_held_out_images(cfg: CfgNode, out: Path) -> None:
    name = cfg.DATASETS.TEST[0]
    images = list(itertools.islice(DatasetCatalog.get(name), NUM_PICTURES))
    predictor = Predictor(cfg.OUTPUT_DIR, device=cfg.MODEL.DEVICE)
    predictions = [predictor(image["file_name"]) for image in images]
    draw_predictions(images, predictions, predictor.classes["names"], out)


def _ap_table(rows: Sequence[Mapping[str, float]]) -> str:
    """Of the last evaluation among the rows of a metrics.json."""
    last = next(row for row in reversed(rows) if "bbox/AP" in row)
    table: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        task, _, metric = key.partition("/")
        if f"{task}/AP" in last:
            table.setdefault(task, {"": task})[metric] = value
    return tabulate(table.values(), headers="keys", floatfmt=".1f")

"""From the photographs to AP: converts, cuts, trains on tiles, evaluates, draws."""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from tabulate import tabulate

from projects.aerial_trees.photographs import prepare_photographs
from rope_vit_det.data.own import TRAIN, register_own_data
from rope_vit_det.data.tiles import slice_datasets
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.main import evaluate
from rope_vit_det.engine.main import run as train
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.ground_truth import score_ground_truth
from rope_vit_det.visualization.worst_images import run as draw

CONFIG = Path(__file__).with_name("config.yaml")
_SIDE = 256  # pixels of a tile; config.yaml has it as TEST.SLICE.SIZE
_ENLARGED = 1.5  # a tile's side at INPUT.MIN_SIZE_TEST
_GRID = [24, 24]  # patches of such a tile
_VAL_SIZE = (1035, 1249)


def run(output: Path, opts: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Trains the small network on tiles, and evaluates it on a whole photograph.

    Args:
        output: for everything; not yet there, but for `photographs/`.
        opts: KEY VALUE pairs over config.yaml.

    Returns:
        AP and AP50 of each evaluation, and of the ground truth; also in OUTPUT/results.json.

    Raises:
        InputError: see :func:`prepare_photographs`; or an earlier run is in the way.
    """
    if (output / "tiles").exists():
        raise InputError(f"{output} holds an earlier run; delete it or name another --output")
    start = time.monotonic()
    splits = prepare_photographs(output / "photographs")
    own = dict(zip(("TRAIN_JSON", "TRAIN_IMAGES"), splits["train"], strict=True))
    own |= dict(zip(("VAL_JSON", "VAL_IMAGES"), splits["val"], strict=True))
    register_own_data(_config(own, []))
    cut = {"side": _SIDE, "overlap": 0.2, "min_area": 0.3}
    print("\n".join(slice_datasets([TRAIN], str(output / "tiles"), **cut)), flush=True)
    own |= {
        "TRAIN_JSON": str(output / "tiles" / f"{TRAIN}.json"),
        "TRAIN_IMAGES": str(output / "tiles" / TRAIN),
    }
    opts = [*_own_opts(own), "OUTPUT_DIR", str(output / "run"), *opts]
    train(argument_parser().parse_args(["--config-file", str(CONFIG), *opts]))
    minutes = (time.monotonic() - start) / 60
    results = _evaluate(own, opts, output)
    files = {"val_json": own["VAL_JSON"], "val_images": own["VAL_IMAGES"]}
    found = output / "run" / "inference" / "coco_instances_results.json"
    draw(str(found), str(output / "drawn"), confidence_threshold=0.3, **files)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(_table(results))
    print(f"{minutes:.1f} minutes to the end of the training and its evaluation, {output}")
    return results


def _evaluate(own: dict[str, str], opts: Sequence[str], output: Path) -> dict[str, dict]:
    results = {}
    for limit in (1000, 100):
        cfg = _config(own, [*opts, "TEST.DETECTIONS_PER_IMAGE", str(limit)])
        name = cfg.DATASETS.TEST[0]
        evaluator = Trainer.build_evaluator(cfg, name, str(output / "truth"))
        score = score_ground_truth(name, evaluator, detections_per_image=limit)
        results[f"the ground truth, {limit} detections an image"] = score.results["bbox"]
    # Whole, at the magnification of the tiles.
    sides = [round(_ENLARGED * side) for side in _VAL_SIZE]
    whole = ["TEST.SLICE.ENABLED", "False", "INPUT.MIN_SIZE_TEST", str(min(sides))]
    whole += ["INPUT.MAX_SIZE_TEST", str(max(sides))]
    # As many proposals to an area as in slices, which are 30.
    whole += ["MODEL.RPN.PRE_NMS_TOPK_TEST", "8000", "MODEL.RPN.POST_NMS_TOPK_TEST", "2000"]
    for positions, grid in (("counting", "None"), ("mapped", str(_GRID))):
        for way, more in (("in slices", []), ("whole", whole)):
            folder = output / "evaluations" / f"{way}, {positions}".replace(" ", "_")
            more = [*more, "MODEL.ROPE_VIT.PT_GRID_SIZE", grid, "OUTPUT_DIR", str(folder)]
            weights = ["MODEL.WEIGHTS", str(output / "run" / "model_final.pth")]
            cfg = _config(own, [*opts, *weights, *more])
            results[f"{way}, {positions} positions"] = evaluate(cfg)["bbox"]
    return {
        name: {metric: float(scores[metric]) for metric in ("AP", "AP50")}
        for name, scores in results.items()
    }


def _own_opts(own: dict[str, str]) -> list[str]:
    return [part for key, value in own.items() for part in (f"DATASETS.OWN.{key}", value)]


def _config(own: dict[str, str], opts: Sequence[str]) -> CfgNode:
    args = Namespace(config_file=str(CONFIG), opts=[*_own_opts(own), *opts], eval_only=False)
    return load_config(args)


def _table(results: dict[str, dict[str, float]]) -> str:
    rows = [[name, f"{each['AP']:.1f}", f"{each['AP50']:.1f}"] for name, each in results.items()]
    return tabulate(rows, ["", "AP", "AP50"], "pipe", disable_numparse=True)

"""The runs: each network from each seed, one after the other."""

import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ViT
from torch import nn

from rope_vit_det.backbone import RoPEViTPyramid, build_retinanet_rope_vit_sfp_backbone
from rope_vit_det.data.demo.dataset import demo_dataset_root, generate_demo_dataset
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.main import run
from rope_vit_det.errors import RunError
from rope_vit_det.evaluation.plots import read_metrics
from rope_vit_det.models import VARIANTS

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
# As in the demo; every second block of the ViT in windows, the others over the whole image.
NETWORKS = {
    "RoPE ViT": "build_retinanet_rope_vit_sfp_backbone",
    "ViTDet": "build_retinanet_vitdet_backbone",
}
EVERY = 100  # iterations between evaluations
TASKS = ("bbox", "segm")


class Run(NamedTuple):
    """A training's evaluations.

    Attributes:
        iterations: how many were done, rising.
        minutes: what they took, without evaluations.
        precisions: AP at each, in percent, for each of `TASKS`.
    """

    network: str
    seed: int
    iterations: list[int]
    minutes: list[float]
    precisions: dict[str, list[float]]


@BACKBONE_REGISTRY.register()
def build_retinanet_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTPyramid:
    """Our pyramid, p3 to p7, over Detectron2's `ViT` as its configs of ViTDet build it."""
    pyramid = build_retinanet_rope_vit_sfp_backbone(cfg, input_shape)
    ours = VARIANTS[cfg.MODEL.ROPE_VIT.NAME]
    depth = ours["num_layers"]
    pyramid.net = ViT(
        patch_size=ours["patch_size"],
        embed_dim=ours["hidden_dim"],
        depth=depth,
        num_heads=ours["num_heads"],
        mlp_ratio=ours["mlp_dim"] / ours["hidden_dim"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=14,
        window_block_indexes=range(0, depth, 2),
        use_rel_pos=True,
    )
    pyramid.in_feature = "last_feat"
    return pyramid


def train_all(output: Path, seeds: Sequence[int], opts: Sequence[str] = ()) -> list[Run]:
    """Trains what is not there yet.

    Args:
        output: for a folder a run.
        opts: KEY VALUE pairs over configs/demo.yaml.

    Raises:
        RunError: a run failed, and has said why.
    """
    generate_demo_dataset(demo_dataset_root())
    runs = []
    for seed in seeds:
        for network, backbone in NETWORKS.items():
            folder = output / f"{network}-{seed}".replace(" ", "_").lower()
            settings = [
                *("MODEL.BACKBONE.NAME", backbone, "SEED", str(seed), "OUTPUT_DIR", str(folder)),
                *("TEST.EVAL_PERIOD", str(EVERY), "SOLVER.AMP.ENABLED", "False", *opts),
            ]
            if not (folder / "model_final.pth").exists():
                command = ["--config-file", str(CONFIG), "--resume", *settings]
                _in_a_fresh_process(command)
            runs.append(_read(folder, network, seed))
    return runs


def _in_a_fresh_process(command: Sequence[str]) -> None:
    """A log file of its own, and nothing that is warm from the run before."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(command,))
    process.start()
    process.join()
    if process.exitcode:
        raise RunError(f"the training {' '.join(command)} ended with status {process.exitcode}")


def _train(command: Sequence[str]) -> None:
    run(argument_parser().parse_args(command))


def _read(folder: Path, network: str, seed: int) -> Run:
    iterations, minutes = [], []
    precisions: dict[str, list[float]] = {task: [] for task in TASKS}
    done, spent = 0, 0.0
    rows = read_metrics(folder / "metrics.json")
    trained = 1 + max(int(row["iteration"]) for row in rows if "total_loss" in row)
    for row in rows:
        # Counted from 0; after the end Detectron2 counts on.
        now = min(int(row["iteration"]) + 1, trained)
        # An iteration's time is logged as the median over those since the row before.
        spent += row.get("time", 0.0) * (now - done) / 60
        done = now
        if f"{TASKS[0]}/AP" in row:
            iterations.append(done)
            minutes.append(spent)
            for task in TASKS:
                precisions[task].append(row[f"{task}/AP"])
    return Run(network, seed, iterations, minutes, precisions)

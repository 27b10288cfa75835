"""Peak memory of a recipe's training step under the switches that save some, on the CPU."""

import multiprocessing
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from projects.benchmark.detectors import random_sample
from projects.benchmark.measure import resident_mib, resident_peak_mib
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.train_step import build_train_step
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError
from rope_vit_det.layers import cpu
from rope_vit_det.utils.memory import process_peak_mib

_CHECKPOINT = ("MODEL.ROPE_VIT.ACTIVATION_CHECKPOINT", "True")
_FLOAT32 = ("SOLVER.AMP.ENABLED", "False")
# What is switched on beside the recipe: KEY VALUE pairs.
SWITCHES = {
    "float32": _FLOAT32,
    "float32, checkpointed": (*_FLOAT32, *_CHECKPOINT),
    "bf16": (),
    "bf16, checkpointed": _CHECKPOINT,
    "bf16, accumulated": ("SOLVER.ACCUMULATE", "2"),
    "bf16, accumulated, checkpointed": ("SOLVER.ACCUMULATE", "2", *_CHECKPOINT),
    "bf16, 8 blocks frozen": ("MODEL.ROPE_VIT.FREEZE_BLOCKS", "8"),
    "bf16, network frozen": ("MODEL.ROPE_VIT.FREEZE_BLOCKS", "-1"),
}


def measure_recipe(
    config_file: str,
    *,
    image_size: tuple[int, int] = (1024, 1024),
    images: int = 2,
    switches: Sequence[str] = tuple(SWITCHES),
    opts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measures a step of `images` images, optimizer and all, with each of the switches (Linux).

    A fresh process for each builds detector and AdamW from the recipe, from random weights, takes a
    step on small images, so that gradients and the optimizer's averages are there, and then the one
    that is measured. The resident memory stands for a GPU's: it holds the same tensors, but not the
    workspaces of a GPU's libraries.

    Args:
        config_file: a yaml recipe of a detector.
        image_size: (h, w) of the images, in pixels.
        images: of a step; halved by accumulation.
        switches: names of `SWITCHES`.
        opts: KEY VALUE pairs for all of them.

    Returns:
        A dict each: "switches"; "held_mib", weights, gradients and averages; "step_mib", the peak
        beyond them; "process_mib", the peak of the process, interpreter and libraries included.

    Raises:
        InputError: an unknown switch.
    """
    if unknown := [name for name in switches if name not in SWITCHES]:
        raise InputError(f"unknown switch {unknown[0]!r}; known are {', '.join(SWITCHES)}")
    context = multiprocessing.get_context("spawn")
    results = []
    for name in switches:
        with context.Pool(1) as pool:
            arguments = (config_file, [*SWITCHES[name], *opts], image_size, images)
            results.append({"switches": name} | pool.apply(_measure, arguments))
    return results


def format_recipe(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown, in GiB."""
    rows = [
        [
            each["switches"],
            *(f"{mib / 1024:.1f}" for mib in (each["held_mib"], each["step_mib"])),
            f"{(each['held_mib'] + each['step_mib']) / 1024:.1f}",
        ]
        for each in results
    ]
    headers = ["", "held, GiB", "step's peak, GiB", "together, GiB"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _measure(
    config_file: str, opts: list[str], image_size: tuple[int, int], images: int
) -> dict[str, float]:
    fixed = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SEED", "1"]
    fixed += ["SOLVER.IMS_PER_BATCH", str(images)]
    cfg = load_config(Namespace(config_file=[config_file], opts=[*fixed, *opts], num_gpus=1))
    before = resident_mib()
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    batches = _batches(images // cfg.SOLVER.ACCUMULATE, cfg.SOLVER.ACCUMULATE, image_size)
    # As on a GPU, autocast is followed.
    with EventStorage(), patch.object(cpu, "_SLOW_BF16", False):
        trainer = build_train_step(cfg, model, batches, optimizer)
        trainer.iter = 0
        trainer.run_step()
        held = resident_mib() - before
        peak = resident_peak_mib(trainer.run_step)
    return {"held_mib": held, "step_mib": peak, "process_mib": process_peak_mib()}


def _batches(
    images: int, accumulate: int, image_size: tuple[int, int]
) -> Iterator[list[dict[str, Any]]]:
    """A step's micro-batches of small images, then of large ones for ever."""
    rng = np.random.default_rng(0)
    for _ in range(accumulate):
        yield [random_sample(rng, 128, 128) for _ in range(images)]
    while True:
        yield [random_sample(rng, *image_size) for _ in range(images)]

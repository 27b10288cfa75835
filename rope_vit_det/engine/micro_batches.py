"""SOLVER.ACCUMULATE 0: as few micro-batches as the memory of the card allows."""

import argparse
import gc
import itertools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..config.keys import with_settings
from ..data.own import register_own_data
from ..distributed.launch import check_batch, count_processes
from ..errors import InputError
from ..utils.own_process import in_own_process
from .train_step import build_train_step

# The rest of a card's memory is for other libraries, and for objects that are more than usual.
_SHARE = 0.9
_SAMPLES = 32  # of the training data, of which the one with the most objects is taken


def check_micro_batches(cfg: CfgNode, processes: int) -> None:
    """
    Raises:
        InputError: a micro-batch would have no image, or a fraction of one.
    """
    solver = cfg.SOLVER
    # What Detectron2 scales the batch from, where it does: micro-batches keep their size.
    reference = solver.ACCUMULATE and solver.REFERENCE_WORLD_SIZE
    check_batch(
        solver.IMS_PER_BATCH,
        reference or processes * max(1, solver.ACCUMULATE),
        key="SOLVER.IMS_PER_BATCH",
        of=f"processes x SOLVER.ACCUMULATE {solver.ACCUMULATE}, or SOLVER.REFERENCE_WORLD_SIZE "
        f"{solver.REFERENCE_WORLD_SIZE}",
    )


def with_micro_batches(cfg: CfgNode, number: int, processes: int) -> CfgNode:
    """A config with this SOLVER.ACCUMULATE, whose batch, rate and schedule stay as they are."""
    settings = {"ACCUMULATE": number, "REFERENCE_WORLD_SIZE": number * processes}
    return with_settings(cfg, {f"SOLVER.{key}": value for key, value in settings.items()})


def usual_number(cfg: CfgNode, processes: int) -> int:
    """The micro-batches of a process that are as large as with SOLVER.REFERENCE_WORLD_SIZE GPUs."""
    most = max(cfg.SOLVER.REFERENCE_WORLD_SIZE // processes, 1)
    return max(n for n in _numbers(cfg.SOLVER.IMS_PER_BATCH, processes) if n <= most)


def settle_micro_batches(
    cfg: CfgNode, args: argparse.Namespace, trainer: type[DefaultTrainer]
) -> CfgNode:
    """A config with a number in place of SOLVER.ACCUMULATE 0, in the process that starts a run.

    A run that is resumed has one in OUTPUT_DIR/config.yaml; on a GPU it is measured; on the CPU it
    is :func:`usual_number`.

    Raises:
        InputError: not even one image fits.
    """
    if cfg.SOLVER.ACCUMULATE:
        return cfg
    processes, number = count_processes(args), 0
    before = Path(cfg.OUTPUT_DIR, "config.yaml")
    if args.resume and before.is_file():
        number = yaml.safe_load(before.read_text("utf-8"))["SOLVER"].get("ACCUMULATE", 0)
    if not number and (args.eval_only or cfg.MODEL.DEVICE == "cpu"):
        number = usual_number(cfg, processes)
    if not number:
        measure = partial(_measure, cfg, processes, trainer)
        number = in_own_process(measure, "measuring memory", cfg.MODEL.DEVICE)
        images = cfg.SOLVER.IMS_PER_BATCH // (processes * number)
        print(f"SOLVER.ACCUMULATE {number}: micro-batches of {images} images fit", flush=True)
    return with_micro_batches(cfg, number, processes)


def agree_on_micro_batches(cfg: CfgNode) -> CfgNode:
    """Has the processes that did not start the run take its number; a collective."""
    number = max(comm.all_gather(cfg.SOLVER.ACCUMULATE))
    if number == cfg.SOLVER.ACCUMULATE:
        return cfg
    return with_micro_batches(cfg, number, comm.get_world_size())


def fewest_that_fit(images: int, processes: int, fits: Callable[[int], bool]) -> int:
    """The least number of micro-batches of a process that fit.

    Args:
        images: of a step, over all processes, which divide them.
        fits: whether that many images fit.

    Raises:
        InputError: not even one does.
    """
    for number in _numbers(images, processes):
        if fits(images // (number * processes)):
            return number
    raise InputError(
        "SOLVER.ACCUMULATE 0: this GPU has no memory for a step of one image; set "
        "MODEL.ROPE_VIT.ACTIVATION_CHECKPOINT True, or smaller INPUT.MIN_SIZE_TRAIN and "
        "MAX_SIZE_TRAIN"
    )


def _numbers(images: int, processes: int) -> list[int]:
    return [n for n in range(1, images + 1) if images % (n * processes) == 0]


def _measure(cfg: CfgNode, processes: int, trainer: type[DefaultTrainer]) -> int:
    """:func:`fewest_that_fit`, by steps; to be called in a process of its own."""
    logging.disable()
    register_own_data(cfg)
    torch.cuda.set_per_process_memory_fraction(_SHARE)
    fits = step_that_fits(cfg, processes, trainer)
    return fewest_that_fit(cfg.SOLVER.IMS_PER_BATCH, processes, fits)


def step_that_fits(
    cfg: CfgNode, processes: int, trainer: type[DefaultTrainer]
) -> Callable[[int], bool]:
    """A function that takes two steps with a number of images, and says whether memory sufficed.

    The images have the largest padded size of the training, and heads get as many objects as they
    may, which they do not before they have learned to find some.
    """
    data = cfg.INPUT
    long, short = data.MAX_SIZE_TRAIN, max(data.MIN_SIZE_TRAIN)
    if data.LSJ.ENABLED:
        long = short = data.LSJ.IMAGE_SIZE
    elif not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        short = long
    settings = {
        "SEED": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (max(data.MIN_SIZE_TRAIN),),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [1e-3],
        "SOLVER.BASE_LR": 0.0,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.ACCUMULATE": 1,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
    }
    small = with_settings(cfg, settings)
    model = trainer.build_model(small)
    optimizer = trainer.build_optimizer(small, model)
    # What a run holds besides: an average of the weights, DDP's buckets of gradients.
    copies = int(cfg.SOLVER.EMA.ENABLED) + int(processes > 1)
    held = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
    samples = itertools.islice(iter(trainer.build_train_loader(small)), _SAMPLES)
    sample = max((each for (each,) in samples), key=lambda each: len(each.get("instances", ())))
    height, width = sample["image"].shape[-2:]
    sides = (long, short) if height > width else (short, long)
    missing = (0, max(0, sides[1] - width), 0, max(0, sides[0] - height))
    sample |= {key: F.pad(sample[key], missing) for key in ("image", "sem_seg") if key in sample}

    def fits(images: int, _held: list[torch.Tensor] = held) -> bool:
        try:
            step = build_train_step(small, model, itertools.repeat([sample] * images), optimizer)
            with EventStorage() as step.storage:
                for step.iter in range(2):  # the second one beside the optimizer's averages
                    step.run_step()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()

    return fits

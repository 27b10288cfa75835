"""From a command line to a checked config: everything that can go wrong before the work starts."""

import argparse
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..checkpoint.checkpoint_files import last_checkpoint
from ..checkpoint.checkpointer import check_weights_path, read_classes, weights_error
from ..checkpoint.resume import check_resume
from ..config.keys import (
    check_input_config,
    check_pyramid_config,
    check_rope_vit_config,
    check_solver_config,
    with_settings,
)
from ..config.rules import check_rules, leaves
from ..config.run_config import config_files, find_config_file, merge_config
from ..config.use import as_arguments, compared_settings, disagreement
from ..data.own import register_own_data
from ..data.validation.check import check_datasets, check_same_classes
from ..errors import InputError
from ..evaluation.slicing import check_slice_config
from ..pyramids import BACKBONES, check_features
from ..utils.memory import bound_caches
from ..weights.detectron2_format import read_info
from ..weights.load import PREFIXES
from .command_line import add_own_data
from .run_folder import check_writable, config_kept, record_run, settle_seed

logger = logging.getLogger(__name__)


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config of a command line with `--config-file`, `--num-gpus` and trailing KEY VALUE.

    Files merge in the order given. A config for a GPU falls to the CPU where there is none. A plain
    path to birder's weights becomes a `birder:` address, which Detectron2 can load.

    Args:
        args: from :func:`~rope_vit_det.engine.command_line.argument_parser`, or Detectron2's.

    Raises:
        InputError: a missing file, one that would run code, an unknown key, a value of the wrong
            type.
    """
    cfg = merge_config([find_config_file(name) for name in config_files(args)], args.opts)
    add_own_data(cfg, args)
    cfg.freeze()
    return cfg


def check_settings(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Checks the values of keys that no code would refuse, without a look at weights or datasets.

    Args:
        eval_only: keys of training are not read.

    Raises:
        InputError: names the key, its value and the allowed ones.
    """
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone in BACKBONES:
        has_pyramid = backbone != "build_rope_vit_backbone"
        check_rope_vit_config(cfg, own_stride=not has_pyramid)
        if has_pyramid:
            check_pyramid_config(cfg)
    check_features(cfg)
    check_rules(cfg, eval_only=eval_only)
    check_input_config(cfg)
    check_slice_config(cfg)
    check_solver_config(cfg)
    check_writable(cfg.OUTPUT_DIR)


def check_config(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> None:
    """Checks, within seconds, what would otherwise end a run later: settings, weights, datasets.

    Args:
        eval_only: the training sets are not needed.
        resume: a checkpoint in OUTPUT_DIR takes the place of MODEL.WEIGHTS.

    Raises:
        InputError: names the key or file, and the remedy.
    """
    check_settings(cfg, eval_only=eval_only)
    check_weights(cfg, eval_only=eval_only, resume=resume)
    if resume and not eval_only:
        check_resume(cfg.OUTPUT_DIR, dict(leaves(cfg)))
    check_data(cfg, eval_only=eval_only, resume=resume)


def check_weights(
    cfg: CfgNode,
    *,
    eval_only: bool = False,
    resume: bool = False,
    spell: Callable[[Mapping[str, Any]], str] = as_arguments,
) -> None:
    """Checks that there are weights, trained with such input as the config describes.

    Args:
        eval_only, resume: see :func:`check_config`.
        spell: see :func:`~rope_vit_det.config.use.disagreement`.

    Raises:
        InputError: names the file, and the remedy.
    """
    if resume and last_checkpoint(cfg.OUTPUT_DIR):
        return
    weights = cfg.MODEL.WEIGHTS
    if eval_only and not weights:
        raise InputError("--eval-only needs MODEL.WEIGHTS, or --resume with a checkpoint")
    try:
        check_weights_path(weights, for_rope_vit="rope_vit" in cfg.MODEL.BACKBONE.NAME)
        # Here and not in the processes of the run, so that only one downloads and converts.
        if cfg.MODEL.ROPE_VIT.CHECK_WEIGHTS and weights.startswith(PREFIXES):
            dtype = torch.bfloat16 if cfg.MODEL.ROPE_VIT.DTYPE == "bfloat16" else torch.float32
            problem = disagreement(compared_settings(cfg), read_info(weights, dtype), spell)
            if problem:
                raise InputError(
                    "these weights were trained with other settings than the config has; "
                    f"{problem}; or set {spell({'MODEL.ROPE_VIT.CHECK_WEIGHTS': False})} to go on "
                    "all the same"
                )
    except InputError as error:
        raise weights_error(weights, error) from None


def check_data(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> None:
    """Checks the datasets, and that a detector to evaluate has their classes.

    Those of a checkpoint to resume from are compared where it is read.

    Args:
        eval_only, resume: see :func:`check_config`.

    Raises:
        InputError: names the dataset or file, and the remedy.
    """
    names = check_datasets(cfg, eval_only=eval_only)
    known = read_classes(cfg.MODEL.WEIGHTS) if eval_only and not resume else None
    if names is not None and known is not None:
        check_same_classes(names, "the dataset", known["names"], f"checkpoint {cfg.MODEL.WEIGHTS}")


def setup(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Detectron2's `default_setup`: loggers, seeds, environment and config into OUTPUT_DIR.

    To be called in every process; only the main one writes.

    Returns:
        The config with the seed that was drawn, where it had none.
    """
    register_own_data(cfg)
    written = None if args.eval_only else cfg.OUTPUT_DIR
    seed = settle_seed(cfg.SEED, written, resume=args.resume)
    cfg = with_settings(cfg, {"SEED": seed})
    # None keeps Detectron2 from a log file for each process.
    visible = cfg if comm.is_main_process() else with_settings(cfg, {"OUTPUT_DIR": None})
    begin(visible, args, cfg.OUTPUT_DIR, seed)
    if cfg.MODEL.DEVICE == "cpu" and not torch.cuda.is_available():
        logger.info("No GPU here: running on the CPU (%d threads)", torch.get_num_threads())
    return cfg


def begin(cfg: CfgNode | DictConfig, args: argparse.Namespace, output: str, seed: int) -> None:
    """Detectron2's `default_setup`, our log, and a line of record, in every process of a run.

    An evaluation in the folder of a training leaves that one's config.yaml.

    Args:
        cfg: whose output folder is None in all but the main process, which writes.
        output: the folder.
    """
    bound_caches()
    mine = output if comm.is_main_process() else None
    setup_logger(mine, distributed_rank=comm.get_rank(), name="rope_vit_det")
    for name in config_files(args):  # as `default_setup` does, which knows only one
        path = find_config_file(name)
        logger.info("Contents of --config-file %s:\n%s", path, Path(path).read_text("utf-8"))
    with config_kept(mine) if mine and args.eval_only else contextlib.nullcontext():
        default_setup(cfg, argparse.Namespace(**vars(args) | {"config_file": ""}))
        if mine is not None:
            record_run(mine, seed, eval_only=args.eval_only)

"""From a command line to a checked config: everything that can go wrong before the work starts."""

import argparse
import logging
import os
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import add_rope_vit_config, check_solver_config
from ..data.check import check_dataset
from ..errors import InputError
from ..use import compared_settings, disagreement
from ..weights.detectron2_format import read_info
from ..weights.load import PREFIX
from .checkpoint import as_birder_url, check_weights_path, weights_error
from .yaml_config import merge_from_yaml

logger = logging.getLogger(__name__)


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config of a command line with `--config-file`, `--num-gpus` and trailing KEY VALUE.

    A config for a GPU falls to the CPU where there is none. A plain path to birder's weights
    becomes a `birder:` address, which Detectron2 can load.

    Args:
        args: from `detectron2.engine.default_argument_parser()`.

    Raises:
        InputError: a missing file, one that would run code, an unknown key, a value of the wrong
            type.
    """
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    if args.config_file:
        if not os.path.isfile(args.config_file):
            raise InputError(f"--config-file {args.config_file}: no such file")
        _merge(args.config_file, partial(merge_from_yaml, cfg), args.config_file)
    _merge("command line", cfg.merge_from_list, args.opts)
    if not torch.cuda.is_available():
        if args.num_gpus > 1:
            raise InputError(f"--num-gpus {args.num_gpus}: this machine has no GPU; leave it out")
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = as_birder_url(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    return cfg


def check_config(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> None:
    """Checks, within seconds, what would otherwise end a run later: switches, weights, datasets.

    Args:
        eval_only: the training sets are not needed.
        resume: a checkpoint in OUTPUT_DIR takes the place of MODEL.WEIGHTS.

    Raises:
        InputError: names the key or file, and the remedy.
    """
    check_solver_config(cfg)
    if not (resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        try:
            check_weights_path(cfg.MODEL.WEIGHTS)
            if cfg.MODEL.ROPE_VIT.CHECK_WEIGHTS:
                _check_agreement(cfg)
        except InputError as error:
            raise weights_error(cfg.MODEL.WEIGHTS, error) from None
        if eval_only and not cfg.MODEL.WEIGHTS:
            raise InputError("--eval-only needs MODEL.WEIGHTS, or --resume with a checkpoint")
    keys = ("TEST",) if eval_only else ("TRAIN", "TEST")
    for key in keys:
        if not cfg.DATASETS[key] and key == "TRAIN":
            raise InputError("DATASETS.TRAIN is empty: name a registered dataset")
        for name in cfg.DATASETS[key]:
            check_dataset(cfg, name, key=f"DATASETS.{key}")


def setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's `default_setup`: loggers, seeds, environment and config into OUTPUT_DIR."""
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="rope_vit_det")
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu" and not torch.cuda.is_available():
        logger.info("No GPU here: running on the CPU (%d threads)", torch.get_num_threads())


def _check_agreement(cfg: CfgNode) -> None:
    """Refuses weights of birder's that were trained with other input than the config describes."""
    if not cfg.MODEL.WEIGHTS.startswith(PREFIX):
        return
    # Here and not in the processes of the run, so that only one downloads and converts.
    problem = disagreement(compared_settings(cfg), read_info(cfg.MODEL.WEIGHTS))
    if problem:
        raise InputError(
            f"these weights were trained with other settings than the config has; {problem}; or "
            "set MODEL.ROPE_VIT.CHECK_WEIGHTS False to go on all the same"
        )


def _merge(source: str, merge: Callable, value: object) -> None:
    try:
        merge(value)
    except InputError:
        raise
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        reason = str(error.args[0] if error.args else error)
        raise InputError(f"{source}: {reason}") from None

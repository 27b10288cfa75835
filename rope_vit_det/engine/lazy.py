"""Training and evaluation under Detectron2's LazyConfigs, on any device.

A LazyConfig is Python and runs when it is loaded: load only files that you trust.
"""

import argparse
import copy
import logging
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from ..data.classes import dataset_classes
from ..errors import InputError
from .checkpoint import DetectorCheckpointer
from .command_line import config_files, find_config_file, log_config_files, without_config_files
from .distributed import launch, wrap_model
from .lazy_checks import check_lazy_config, dataset_names
from .learning_rates import learning_rate_table
from .output import check_output, clear_output, describe_output
from .record import record_run
from .train_step import TrainStep

logger = logging.getLogger(__name__)

_PARTS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")


def run_lazy(args: argparse.Namespace) -> None:
    """Trains or evaluates as a command line says, in as many processes as it says.

    Args:
        args: of :func:`~rope_vit_det.engine.command_line.argument_parser`.

    Raises:
        InputError: for a wrong config or weights.
    """
    cfg = load_lazy_config(args)
    check_output(cfg.train.output_dir, args)
    check_lazy_config(cfg, eval_only=args.eval_only, resume=args.resume)
    clear_output(cfg.train.output_dir, args)
    launch(_run_in_process, args, device=cfg.train.device)


def load_lazy_config(args: argparse.Namespace) -> DictConfig:
    """The LazyConfig of a command line with `--config-file` and trailing `key=value`.

    A config for a GPU falls to the CPU where there is none.

    Args:
        args: from :func:`~rope_vit_det.engine.command_line.argument_parser`.

    Raises:
        InputError: no file or more than one, an override that does not parse, a part that lacks.
    """
    files = config_files(args)
    if len(files) != 1 or not files[0].endswith(".py"):
        raise InputError(
            "--config-file takes one LazyConfig (.py) here; tools/train_net.py takes yaml files"
        )
    path = find_config_file(files[0])
    cfg = LazyConfig.load(path)
    missing = [part for part in _PARTS if part not in cfg]
    if missing:
        raise InputError(
            f"{path} has no {', '.join(missing)}; a LazyConfig defines all of {_PARTS}"
        )
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # hydra's and OmegaConf's, which share no class
        raise InputError(f"command line: {str(error).splitlines()[0]}") from None
    if not torch.cuda.is_available():
        cfg.train.device = "cpu"
    return cfg


def build_trainer(cfg: DictConfig, *, resume: bool = False) -> TrainStep:
    """Model, optimizer and data of a config, with hooks, and weights loaded.

    The hooks are those of Detectron2's `tools/lazyconfig_train_net.py`.

    Args:
        resume: continue from the last checkpoint in train.output_dir, if there is one.

    Returns:
        A trainer whose `train(trainer.start_iter, cfg.train.max_iter)` trains.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    logger.info(
        "Learning rates, before warm-up and schedule:\n%s", learning_rate_table(model, optimizer)
    )
    model = wrap_model(model, **cfg.train.ddp)
    trainer = TrainStep(
        model,
        instantiate(cfg.dataloader.train),
        optimizer,
        seed=_shared_seed(cfg),
        precision=_precision(cfg),
    )
    saving = cfg.train.checkpointer
    names = dataset_names(cfg, "train")
    checkpointer = DetectorCheckpointer(
        model,
        cfg.train.output_dir,
        classes=dataset_classes(names[0]) if names else None,
        keep=saving.get("max_to_keep", 0),
        trainer=trainer,
    )
    on_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, saving.period) if on_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: _test(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if on_main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.start_iter = trainer.iter + 1 if resumed else 0
    return trainer


def train(cfg: DictConfig, *, resume: bool = False) -> None:
    """Trains, evaluates on the way and at the end.

    Args:
        resume: see :func:`build_trainer`.
    """
    trainer = build_trainer(cfg, resume=resume)
    trainer.train(trainer.start_iter, cfg.train.max_iter)


def evaluate(cfg: DictConfig, *, resume: bool = False) -> "OrderedDict[str, Any]":
    """Evaluates train.init_checkpoint, or with `resume` the last checkpoint there is."""
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = DetectorCheckpointer(model, cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return _test(cfg, model)


def _test(cfg: DictConfig, model: nn.Module) -> "OrderedDict[str, Any]":
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _run_in_process(args: argparse.Namespace) -> None:
    # A LazyConfig holds functions, which do not travel to other processes: each loads its own.
    cfg = load_lazy_config(args)
    cfg.train.seed = _shared_seed(cfg)
    visible = copy.deepcopy(cfg)
    if not comm.is_main_process():
        visible.train.output_dir = ""  # keeps Detectron2 from a log file for each process
    setup_logger(visible.train.output_dir, distributed_rank=comm.get_rank(), name="rope_vit_det")
    log_config_files(args)
    default_setup(visible, without_config_files(args))
    if comm.is_main_process():
        record_run(cfg.train.output_dir, cfg.train.seed)
    (evaluate if args.eval_only else train)(cfg, resume=args.resume)
    if comm.is_main_process():
        logger.info(describe_output(cfg.train.output_dir))


def _precision(cfg: DictConfig) -> torch.dtype:
    amp = cfg.train.amp
    return getattr(torch, amp.get("dtype", "bfloat16")) if amp.enabled else torch.float32


def _shared_seed(cfg: DictConfig) -> int:
    """`train.seed`, or one drawn for all processes together."""
    seed = cfg.train.get("seed", -1)
    return seed if seed >= 0 else comm.shared_random_seed()

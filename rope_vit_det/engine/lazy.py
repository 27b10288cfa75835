"""Training and evaluation under Detectron2's LazyConfigs, on any device.

A LazyConfig is Python and runs when it is loaded: load only files that you trust.
"""

import argparse
import copy
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint.checkpointer import DetectorCheckpointer
from ..checkpoint.running_state import RunningState
from ..config.run_config import config_files, find_config_file
from ..data.classes import dataset_classes
from ..data.demo.dataset import register_where_named
from ..data.loader import build_seeded_loader
from ..data.workers import ShieldedLoader
from ..distributed.launch import launch, wrap_model
from ..errors import InputError
from ..solver.learning_rates import learning_rate_table
from ..utils.memory import bound_caches
from ..utils.seeding import Purpose, seed_all
from .command_line import log_config_files, without_config_files
from .divergence import replay
from .hooks import Checkpoints, EventHistory
from .lazy_checks import check_lazy_config, dataset_names
from .resumable import ResumableTrainer
from .run_folder import check_output, clear_output, describe_output, record_run, settle_seed
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
    if args.replay:
        model = instantiate(cfg.model).to(cfg.train.device)
        replay(model, args.replay, precision=_precision(cfg))
        return
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
    register_where_named(dataset_names(cfg, "train") + dataset_names(cfg, "test"))
    return cfg


class LazyTrainer(ResumableTrainer, TrainStep):
    """The step itself, without a config, as Detectron2's tool for LazyConfigs has it."""


def build_trainer(cfg: DictConfig, *, resume: bool = False) -> LazyTrainer:
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
    running_state = RunningState(model)
    model = wrap_model(model, **cfg.train.ddp)
    seed = settle_seed(cfg.train.get("seed", -1))
    trainer = LazyTrainer(
        model, _train_loader(cfg, seed), optimizer, seed=seed, precision=_precision(cfg)
    )
    trainer.running_state = running_state
    saving = cfg.train.checkpointer
    names = dataset_names(cfg, "train")
    trainer.checkpointer = checkpointer = DetectorCheckpointer(
        model,
        cfg.train.output_dir,
        classes=dataset_classes(names[0]) if names else None,
        keep=saving.get("max_to_keep", 0),
        running_state=running_state,
        trainer=weakref.proxy(trainer),
    )
    writers = []
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            EventHistory(writers),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            Checkpoints(checkpointer, saving.period, running_state),
            hooks.EvalHook(cfg.train.eval_period, lambda: _test(cfg, model)),
            hooks.PeriodicWriter(writers, cfg.train.log_period),
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
    checkpointer = DetectorCheckpointer(model, cfg.train.output_dir, whole=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return _test(cfg, model)


def _test(cfg: DictConfig, model: nn.Module) -> "OrderedDict[str, Any]":
    loader = instantiate(cfg.dataloader.test)
    if isinstance(loader, DataLoader):
        loader = ShieldedLoader(loader)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _run_in_process(args: argparse.Namespace) -> None:
    bound_caches()
    # A LazyConfig holds functions, which do not travel to other processes: each loads its own.
    cfg = load_lazy_config(args)
    output = None if args.eval_only else cfg.train.output_dir
    cfg.train.seed = settle_seed(cfg.train.get("seed", -1), output, resume=args.resume)
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


def _train_loader(cfg: DictConfig, seed: int) -> Iterable[list[dict]]:
    """That of the config; Detectron2's own with our stream and random state, to resume exactly."""
    seed_all(seed, Purpose.ORDER)
    parts = {key: instantiate(value) for key, value in cfg.dataloader.train.items()}
    build = parts.pop("_target_")
    build = locate(build) if isinstance(build, str) else build
    if build is build_detection_train_loader and isinstance(parts["dataset"], list):
        return build_seeded_loader(**parts, seed=seed)
    logger.warning("dataloader.train is not Detectron2's of a list: resumed, its data starts over")
    return build(**parts)

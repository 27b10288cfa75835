"""Training and evaluation under Detectron2's LazyConfigs, on any device.

A LazyConfig is Python and runs when it is loaded: load only files that you trust.
"""

import argparse
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigTypeError
from torch import nn

from ..checkpoint.checkpointer import DetectorCheckpointer
from ..checkpoint.resume import check_resume
from ..config.keys import check_precision, default_config, set_keys
from ..config.run_config import config_files, find_config_file
from ..data.classes import dataset_classes
from ..data.coco_file import clean_records
from ..data.demo.dataset import register_where_named
from ..data.loader import build_seeded_loader
from ..data.workers import ShieldedLoader
from ..distributed.launch import (
    check_batch,
    check_processes,
    count_processes,
    launch,
    starts_the_run,
    wrap_model,
)
from ..errors import InputError
from ..evaluation.fast import FastCOCOEvaluator, FastLVISEvaluator
from ..models.variants import VARIANTS
from ..utils.seeding import Purpose, seed_all
from ..weights.detector import LAZY_NAMES
from ..weights.load import as_birder_url
from .divergence import replay
from .hooks import Checkpoints, EventHistory
from .rehearsal import MAX_IMAGES, Parts, rehearse
from .run_folder import check_output, check_writable, clear_output, describe_output, settle_seed
from .setup import begin, check_data, check_weights
from .train_step import TrainStep, training_precision
from .trainer import ResumableTrainer

logger = logging.getLogger(__name__)

_PARTS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")
# By the key that says their number of classes.
_ARCHITECTURES = {
    "MODEL.ROI_HEADS.NUM_CLASSES": "GeneralizedRCNN",
    "MODEL.RETINANET.NUM_CLASSES": "RetinaNet",
}


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
        replay(model, args.replay, precision=training_precision(_as_yaml(cfg)))
        return
    output, device = cfg.train.output_dir, cfg.train.device
    if starts_the_run():
        check_processes(args, device)
        if not args.eval_only:
            _check_batch(cfg, count_processes(args))
        check_writable(output, key="train.output_dir")
        check_output(output, args)
        check_lazy_config(cfg, eval_only=args.eval_only, resume=args.resume)
        rehearse(partial(_parts, args), args, output=output, device=device)
        clear_output(output, args)
    launch(_run_in_process, args, device=device)


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
    if not torch.cuda.device_count():
        cfg.train.device = "cpu"
    register_where_named(dataset_names(cfg, "train") + dataset_names(cfg, "test"))
    evaluators = cfg.dataloader.get("evaluator")
    parts = evaluators if isinstance(evaluators, ListConfig) else [evaluators]
    for part in (*parts, cfg.dataloader.get("test")):
        target = _target(part)
        if target in _OURS:
            part._target_ = _OURS[target]
    return cfg


def _target(part: Any) -> Any:
    """What a part of a config calls; None: nothing."""
    target = part.get("_target_") if isinstance(part, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def _test_loader(*, dataset: Any, **kwargs: Any) -> ShieldedLoader:
    records = clean_records(dataset) if isinstance(dataset, list) else dataset
    return ShieldedLoader(build_detection_test_loader(dataset=records, **kwargs))


# In place of Detectron2's: they digest what other people's tools write.
_OURS = {
    build_detection_test_loader: _test_loader,
    COCOEvaluator: FastCOCOEvaluator,
    LVISEvaluator: FastLVISEvaluator,
}


def check_lazy_config(cfg: DictConfig, *, eval_only: bool = False, resume: bool = False) -> None:
    """Checks, within seconds, what would otherwise end a run later: weights and datasets.

    Args:
        eval_only: the training set is not needed.
        resume: a checkpoint in train.output_dir takes the place of train.init_checkpoint.

    Raises:
        InputError: names the key or file, and the remedy.
    """
    _check_loaders(cfg, eval_only=eval_only)
    view = _as_yaml(cfg)
    if resume and not eval_only:
        check_resume(cfg.train.output_dir, _settings(cfg))
    # A split whose loader is not Detectron2's is its author's to check.
    known = view.DATASETS["TEST" if eval_only else "TRAIN"]
    try:
        check_precision(view)
        check_weights(view, eval_only=eval_only, resume=resume, spell=_as_overrides)
        if known:
            check_data(view, eval_only=eval_only, resume=resume)
    except InputError as error:
        keys = "|".join(map(re.escape, LAZY_NAMES))
        raise InputError(re.sub(keys, lambda key: LAZY_NAMES[key[0]], str(error))) from None


def _check_loaders(cfg: DictConfig, *, eval_only: bool) -> None:
    """A training may do without an evaluator, as in Detectron2's tool."""
    needed = {"evaluator": "--eval-only"} if eval_only else {"train": "a training"}
    if cfg.dataloader.get("evaluator") is not None:
        needed["test"] = "dataloader.evaluator"
    for name, what in needed.items():
        if cfg.dataloader.get(name) is None:
            raise InputError(f"the config has no dataloader.{name}, which {what} needs: define it")


def _check_batch(cfg: DictConfig, processes: int) -> None:
    key = "dataloader.train.total_batch_size"
    images = _select(cfg, key)
    known = _target(cfg.dataloader.get("train")) is build_detection_train_loader
    if known and isinstance(images, int):
        check_batch(images, processes, key=key, of="processes")


def dataset_names(cfg: DictConfig, split: str) -> tuple[str, ...]:
    """The registered datasets of a split; none where its loader is not Detectron2's.

    Args:
        split: "train" or "test".
    """
    names = _select(cfg, f"dataloader.{split}.dataset.names")
    return (names,) if isinstance(names, str) else tuple(names or ())


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
    settings, saving, output = _settings(cfg), cfg.train.checkpointer, cfg.train.output_dir
    model = instantiate(cfg.model).to(cfg.train.device)
    trainer = _build_step(cfg, model, settle_seed(cfg.train.get("seed", -1)))
    keep, names = saving.get("max_to_keep", 0), dataset_names(cfg, "train")
    trainer.prepare(model, output, names, settings=settings, keep=keep)
    writers = default_writers(output, cfg.train.max_iter) if comm.is_main_process() else []
    trainer.register_hooks(
        [
            EventHistory(writers),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            Checkpoints(trainer.checkpointer, saving.period),
            hooks.EvalHook(cfg.train.eval_period, partial(_test, cfg, trainer.model)),
            hooks.PeriodicWriter(writers, cfg.train.log_period),
        ]
    )
    trainer.checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and trainer.checkpointer.has_checkpoint()
    trainer.start_iter = trainer.iter + 1 if resumed else 0
    return trainer


def _build_step(cfg: DictConfig, model: nn.Module, seed: int) -> LazyTrainer:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = wrap_model(model, **cfg.train.ddp)
    loader, precision = _train_loader(cfg, seed), training_precision(_as_yaml(cfg))
    return LazyTrainer(model, loader, optimizer, seed=seed, precision=precision)


def train(cfg: DictConfig, *, resume: bool = False) -> None:
    """Trains, evaluates on the way and at the end.

    Args:
        resume: see :func:`build_trainer`.
    """
    trainer = build_trainer(cfg, resume=resume)
    trainer.train(trainer.start_iter, cfg.train.max_iter)


def evaluate(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Evaluates train.init_checkpoint, or with `resume` the last checkpoint there is."""
    model = instantiate(cfg.model).to(cfg.train.device)
    names = dataset_names(cfg, "test")
    classes = dataset_classes(names[0]) if names else None
    checkpointer = DetectorCheckpointer(model, cfg.train.output_dir, classes=classes, whole=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return _test(cfg, model)


def _test(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    if cfg.dataloader.get("evaluator") is None:
        logger.warning("The config has no dataloader.evaluator: nothing is evaluated")
        return {}
    results = inference_on_dataset(model, *_test_set(cfg))
    print_csv_format(results)
    return results


def _test_set(cfg: DictConfig) -> tuple[Iterable[list[dict]], DatasetEvaluator]:
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    if isinstance(evaluator, ListConfig):
        evaluator = DatasetEvaluators(list(evaluator))
    return loader, evaluator


def _run_in_process(args: argparse.Namespace) -> None:
    # A LazyConfig holds functions, which do not travel to other processes: each loads its own.
    cfg = load_lazy_config(args)
    folder, seed = cfg.train.output_dir, cfg.train.get("seed", -1)
    cfg.train.seed = settle_seed(seed, None if args.eval_only else folder, resume=args.resume)
    if not comm.is_main_process():
        cfg.train.output_dir = None  # keeps Detectron2 from a log file for each process
    begin(cfg, args, folder, cfg.train.seed)
    cfg.train.output_dir = folder
    (evaluate if args.eval_only else train)(cfg, resume=args.resume)
    logger.info(describe_output(cfg.train.output_dir))


def _train_loader(cfg: DictConfig, seed: int) -> Iterable[list[dict]]:
    """That of the config; Detectron2's own with our stream and random state, to resume exactly."""
    seed_all(seed, Purpose.ORDER)
    build = _target(cfg.dataloader.train)
    parts = {k: instantiate(v) for k, v in cfg.dataloader.train.items() if k != "_target_"}
    if build is build_detection_train_loader and isinstance(parts["dataset"], list):
        return build_seeded_loader(**parts, seed=seed)
    logger.warning("dataloader.train is not Detectron2's of a list: resumed, its data starts over")
    return build(**parts)


def _parts(args: argparse.Namespace, folder: str) -> Parts:
    """What a rehearsal builds; the config is loaded again, since each part of it is used once."""
    cfg = load_lazy_config(args)
    evaluated = cfg.dataloader.get("evaluator") is not None
    names = dataset_names(cfg, "test")[:1] if evaluated else ()
    cfg.train.output_dir = folder
    for split in ("train", "test"):
        if "num_workers" in (cfg.dataloader.get(split) or ()):
            cfg.dataloader[split].num_workers = 0
    if "total_batch_size" in (cfg.dataloader.get("train") or ()):
        images = cfg.dataloader.train.total_batch_size // count_processes(args)
        cfg.dataloader.train.total_batch_size = min(MAX_IMAGES, max(1, images))

    def train_step(model: nn.Module) -> LazyTrainer:
        instantiate(cfg.lr_multiplier)
        return _build_step(cfg, model, max(0, cfg.train.get("seed", -1)))

    return Parts(
        model=lambda: instantiate(cfg.model).to(cfg.train.device),
        train_step=None if args.eval_only else train_step,
        test_sets={name: partial(_test_set, cfg) for name in names},
    )


def _as_overrides(settings: Mapping[str, Any]) -> str:
    """Settings as `key=value` on the command line."""
    pairs = (f"{LAZY_NAMES[key]}={value}".replace(", ", ",") for key, value in settings.items())
    return shlex.join(pairs)


def _as_yaml(cfg: DictConfig) -> CfgNode:
    """What a yaml config of the same run would say, as far as the checks read it."""
    view = default_config()
    # Other models than Detectron2's may have them elsewhere.
    view.INPUT.FORMAT = view.MODEL.PIXEL_MEAN = view.MODEL.PIXEL_STD = None
    view.MODEL.META_ARCHITECTURE = "unknown"
    found = {key: _select(cfg, place) for key, place in LAZY_NAMES.items()}
    found |= {f"DATASETS.{split.upper()}": dataset_names(cfg, split) for split in ("train", "test")}
    said = {key: value for key, value in found.items() if value is not None}
    set_keys(view, said)
    for key in said:
        view.MODEL.META_ARCHITECTURE = _ARCHITECTURES.get(key, view.MODEL.META_ARCHITECTURE)
    view.MODEL.WEIGHTS = as_birder_url(view.MODEL.WEIGHTS)
    view.MODEL.KEYPOINT_ON = found["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] is not None
    if found["MODEL.ROPE_VIT.NAME"] not in VARIANTS:
        view.MODEL.ROPE_VIT.CHECK_WEIGHTS = False  # they are another network's
    return view


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """Its plain values and its functions and classes, by key."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list):
            for name, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(each, f"{key}.{name}" if key else str(name))
        elif callable(value):
            name = getattr(value, "__qualname__", type(value).__name__)
            yield key, f"{value.__module__}.{name}"
        elif value is None or isinstance(value, str | int | float):
            yield key, value

    return dict(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def _select(cfg: DictConfig, place: str) -> Any:
    try:
        return OmegaConf.select(cfg, place)
    except ConfigTypeError:
        return None  # a list where Detectron2's configs have keys

"""The start of a run, rehearsed before it: everything is built and used once, then thrown away.

What a config, a dataset or a user's own code would end a training with hours later, it ends here,
in one line. Nothing of the run is touched: what is built is the rehearsal's own, it writes into a
temporary folder, and what is global is put back.
"""

import argparse
import contextlib
import io
import logging
import random
import re
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils.events import EventStorage
from torch import nn

from ..config.keys import default_config, with_settings
from ..config.rules import leaves
from ..config.run_config import PACKAGE
from ..data.validation.check import FAULTS_FILE
from ..detectron2_private import logged_once
from ..distributed.launch import count_processes
from ..errors import InputError
from ..evaluation.ground_truth import score_ground_truth
from ..evaluation.slicing import in_slices
from ..utils.own_process import in_own_process
from .run_folder import TRACEBACK_FILE
from .train_step import TrainStep, build_train_step, total_loss

_SHORT = 10.0  # seconds that need no word
_EXAMPLES = 3
_LONGEST = 300  # characters of an exception: some bring the whole config
MAX_IMAGES = 2  # of the batch: one alone is too few for batch norm
_NOT_THE_USERS = tuple(
    str(folder)
    for folder in (PACKAGE, Path(detectron2.__file__).parent, *sysconfig.get_paths().values(), "<")
)


@dataclass(frozen=True)
class Parts:
    """What a run consists of, each built by a call.

    Attributes:
        model: on its device.
        train_step: with optimizer, schedule and loader; None: nothing is trained.
        test_sets: dataset to its loader, without workers, and evaluator.
        as_tested: wraps the model for the test images.
        with_tta: wraps the model, where test-time augmentation is on.
        metrics: keys, and metrics that they name, such as "bbox/AP".
        values: what a user has set, to the keys; exceptions that say such a value get its key.
    """

    model: Callable[[], nn.Module]
    train_step: Callable[[nn.Module], TrainStep] | None
    test_sets: Mapping[str, Callable[[], tuple[Iterable[list[dict]], DatasetEvaluator]]]
    as_tested: Callable[[nn.Module], nn.Module] = lambda model: model
    with_tta: Callable[[nn.Module], nn.Module] | None = None
    detections_per_image: int = 100
    metrics: Collection[tuple[str, str]] = ()
    values: Mapping[str, str] = field(default_factory=dict)


def rehearse(
    build: Callable[[str], Parts], args: argparse.Namespace, *, output: str, device: str
) -> None:
    """Plays a run's start through; where processes or a GPU take part, in a process of its own.

    Args:
        build: gives the parts of a run whose OUTPUT_DIR is the folder that it is called with.
        args: of the command line; with --no-rehearsal nothing is done.
        output: OUTPUT_DIR of the run, for the traceback and the faults of the datasets.
        device: of the model.

    Raises:
        InputError: the run would end in an error, or in nonsense; says at which step.
    """
    if getattr(args, "no_rehearsal", False):
        return
    start = time.perf_counter()
    Path(output, TRACEBACK_FILE).unlink(missing_ok=True)
    rehearsed = partial(_rehearse, build, output)
    if device.startswith("cuda") or count_processes(args) > 1:
        in_own_process(rehearsed, "rehearsal", device)
    else:
        rehearsed()
    seconds = time.perf_counter() - start
    if seconds > _SHORT:
        print(f"Rehearsal: {seconds:.0f} s (--no-rehearsal leaves it out)", flush=True)


def rehearse_config(cfg: CfgNode, args: argparse.Namespace, trainer: type[DefaultTrainer]) -> None:
    """:func:`rehearse` for a yaml config, through the classmethods of its trainer."""
    build = partial(_parts, cfg, args, trainer)
    rehearse(build, args, output=cfg.OUTPUT_DIR, device=cfg.MODEL.DEVICE)


def _parts(
    cfg: CfgNode, args: argparse.Namespace, trainer: type[DefaultTrainer], folder: str
) -> Parts:
    usual = dict(leaves(default_config()))
    values = {v: k for k, v in leaves(cfg) if isinstance(v, str) and v and v != usual.get(k)}
    micro_batches = count_processes(args) * max(1, cfg.SOLVER.ACCUMULATE)
    parallel = cfg.SOLVER.REFERENCE_WORLD_SIZE or micro_batches
    settings = {
        "OUTPUT_DIR": folder,
        "SEED": max(cfg.SEED, 0),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": min(MAX_IMAGES, cfg.SOLVER.IMS_PER_BATCH // parallel),
        "SOLVER.ACCUMULATE": 1,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
    }
    cfg = with_settings(cfg, settings)

    def train_step(model: nn.Module) -> TrainStep:
        optimizer = trainer.build_optimizer(cfg, model)
        trainer.build_lr_scheduler(cfg, optimizer)
        return build_train_step(cfg, model, trainer.build_train_loader(cfg), optimizer)

    metrics = [("TEST.EXPECTED_RESULTS", "/".join(each[:2])) for each in cfg.TEST.EXPECTED_RESULTS]
    if cfg.TEST.AUG.ENABLED:  # whose tasks are those without it
        metrics = [(key, metric.replace("_TTA/", "/")) for key, metric in metrics]
    if cfg.SOLVER.BEST_METRIC and not args.eval_only:
        metrics.append(("SOLVER.BEST_METRIC", cfg.SOLVER.BEST_METRIC))

    def test_set(name: str) -> tuple[Iterable[list[dict]], DatasetEvaluator]:
        return trainer.build_test_loader(cfg, name), trainer.build_evaluator(cfg, name)

    return Parts(
        model=lambda: trainer.build_model(cfg),
        train_step=None if args.eval_only else train_step,
        test_sets={name: partial(test_set, name) for name in cfg.DATASETS.TEST},
        as_tested=partial(in_slices, cfg),
        with_tta=partial(GeneralizedRCNNWithTTA, cfg) if cfg.TEST.AUG.ENABLED else None,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        metrics=metrics,
        values=values,
    )


def _rehearse(build: Callable[[str], Parts], output: str) -> None:
    lines: list[str] = []
    with TemporaryDirectory() as folder, _nothing_stays(), EventStorage(0):
        parts = build(folder)
        named = partial(_named, output, parts.values)
        with named("building the model"):
            model = parts.model()
        if parts.with_tta:
            with named("building test-time augmentation"):
                parts.with_tta(model)
        if parts.train_step:
            with named("building optimizer, schedule and training data"):
                step = parts.train_step(model)
            with named("the first training batch"):
                _train(step)
        found = []
        for name, build_test in parts.test_sets.items():
            with named(f"building the evaluation of dataset {name!r}"):
                loader, evaluator = build_test()
            with named(f"inference on an image of dataset {name!r}"):
                image = _infer(parts.as_tested(model), loader)
            with named(f"scoring the ground truth of dataset {name!r} against itself"):
                metrics, notes = _score(name, evaluator, image, parts, Path(output, FAULTS_FILE))
            lines += notes
            prefix = f"{name}/" if len(parts.test_sets) > 1 else ""
            found.append({prefix + metric for metric in metrics})
        for key, metric in parts.metrics if all(found) else ():
            _check_metric(key, metric, set().union(*found))
    for line in lines:
        print(line, flush=True)


def _train(step: TrainStep) -> None:
    losses = step.forward(next(iter(step.data_loader)), 0)
    loss = total_loss(losses)
    if not torch.isfinite(loss):
        values = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
        raise InputError(f"the loss of the first training batch is not finite: {values}")
    loss.backward()


def _infer(model: nn.Module, loader: Iterable[list[dict]]) -> tuple[list[dict], list[dict]]:
    """The first image of a loader and what the model makes of it."""
    inputs = next(iter(loader))
    model.eval()
    with torch.no_grad():
        return inputs, model(inputs)


def _score(
    name: str, evaluator: DatasetEvaluator, image: tuple[list, list], parts: Parts, faults: Path
) -> tuple[set[str], list[str]]:
    """The metrics that a run will have of a dataset, none where that is not known; lines to print.

    Args:
        image: inputs and outputs of the model.
        faults: the file to which the objects go that the evaluator does not find.
    """
    limit, fields = parts.detections_per_image, _fields(image[1][0])
    score = score_ground_truth(name, evaluator, detections_per_image=limit, fields=fields)
    results, lines = score.results, [*score.notes]
    if not score.known:
        try:
            evaluator.reset()
            evaluator.process(*image)
            results = evaluator.evaluate()
        except Exception as error:  # an evaluator of the user's may want more than one image
            words = " ".join(f"{type(error).__name__} {error}".split())
            lines.append(f"warning: the evaluator of dataset {name!r}, given one image: {words}")
    if score.missed:
        head = f"dataset {name!r}: objects that its evaluator does not find in their own truth"
        with faults.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in (head, *("    " + m for m in score.missed)))
        some = "; ".join(score.missed[:_EXAMPLES])
        lines.append(f"warning: {head}: {len(score.missed)} ({some}), listed in {faults}")
    return set(flatten_results_dict(results or {})), lines


def _check_metric(key: str, metric: str, known: Collection[str]) -> None:
    if metric not in known:
        metrics = sorted(each for each in known if "/AP" in each) or sorted(known)
        raise InputError(
            f"{key} names {metric!r}; the evaluation gives: {', '.join(metrics) or 'none'}"
        )


def _fields(output: Mapping[str, Any]) -> Collection[str] | None:
    """Of the instances that a model puts out; None: it has other outputs."""
    if "instances" in output:
        return output["instances"].get_fields()
    return () if "proposals" in output else None


@contextlib.contextmanager
def _named(output: str, values: Mapping[str, str], step: str) -> Iterator[None]:
    """Exceptions become one line with the step, and a traceback in a file."""
    try:
        yield
    except Exception as error:  # of Detectron2's code, or the user's
        known = isinstance(error, InputError)
        if known and error.__cause__ is None:
            raise
        file = Path(output, TRACEBACK_FILE)
        file.write_text(traceback.format_exc(), "utf-8")
        if known:
            raise InputError(f"{error}; the traceback is in {file}") from None
        frames = traceback.extract_tb(error.__traceback__)
        users = [each for each in frames if not each.filename.startswith(_NOT_THE_USERS)]
        place = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
        words = (" ".join(str(error).split()) or frames[-1].line or "")[:_LONGEST]
        keys = [
            f"{key} is {value!r}; "
            for value, key in values.items()
            if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", words)
        ]
        raise InputError(
            f"{''.join(keys)}rehearsal, {step}: {type(error).__name__} {words}{place}; the "
            f"traceback is in {file}"
        ) from None


@contextlib.contextmanager
def _nothing_stays() -> Iterator[None]:
    """Puts back what is global, and prints and logs nothing."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        contextlib.ExitStack() as afterwards,
        torch.random.fork_rng(gpus),
        torch.jit.optimized_execution(False),  # see TrainStep
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        logged_once(),  # what is said only once, the run is to say
    ):
        afterwards.callback(random.setstate, random.getstate())
        afterwards.callback(np.random.set_state, np.random.get_state())
        afterwards.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        yield

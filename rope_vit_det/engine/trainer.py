"""The training loop: Detectron2's, of a run that can end at any moment, and go on as it was."""

import errno
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.checkpoint_files import cannot_write
from ..checkpoint.checkpointer import DetectorCheckpointer
from ..checkpoint.resume import RunningState
from ..config.keys import with_settings
from ..config.rules import leaves
from ..data.classes import dataset_classes
from ..data.loader import MicroBatchSampler, build_test_loader, build_train_loader
from ..detectron2_private import time_every_iteration
from ..distributed.launch import wrap_model
from ..errors import InputError, RunError
from ..evaluation.evaluators import build_evaluator
from ..evaluation.slicing import in_slices
from ..solver.optimizers import build_optimizer, learning_rate_table
from ..utils.memory import peak_memory_mib
from .divergence import end_diverged
from .hooks import EMA, BestCheckpointer, Checkpoints, EventHistory, PreciseBN, StopTraining
from .micro_batches import usual_number, with_micro_batches
from .run_folder import settle_seed
from .train_step import NotFiniteError, TrainStep, build_train_step

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _needs_its_traceback(record: logging.LogRecord) -> bool:
    """For Detectron2's loop, which logs what ends it: not where that becomes one line here."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, RunError) or getattr(error, "errno", None) in _FULL)


logging.getLogger(TrainerBase.__module__).addFilter(_needs_its_traceback)


class ResumableTrainer(TrainerBase):
    """Stops with checkpoints and one-line errors, and resumes exactly; a base before another one.

    The trainer has a :class:`Checkpoints` among its hooks. What comes before it in the list is in
    the checkpoint; what comes after it (evaluation, writing) is done again after a resume.
    """

    checkpointer: DetectorCheckpointer
    running_state: RunningState
    ema: EMA | None = None

    def prepare(
        self, model: nn.Module, output: str, datasets: Sequence[str], **options: Any
    ) -> None:
        """Logs the learning rates, and makes `checkpointer` and `running_state`.

        Args:
            model: the one that is trained, newly built.
            output: folder of the checkpoints.
            datasets: of the training; the first one says the classes.
            options: of :class:`DetectorCheckpointer`.
        """
        table = learning_rate_table(model, self.step.optimizer)
        logger.info("Learning rates, before warm-up and schedule:\n%s", table)
        self.running_state = RunningState(model)
        self.checkpointer = DetectorCheckpointer(
            self.evaluated_model,
            output,
            classes=dataset_classes(datasets[0]) if datasets else None,
            running_state=self.running_state,
            trainer=weakref.proxy(self),
            **options,
        )

    def train(self, *args: Any) -> None:
        """See :class:`TrainerBase`.

        Raises:
            RunError: a signal, a loss that is not finite, or a full disk ended the training.
        """
        with self._checkpoints.stopping():
            try:
                super().train(*args)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                folder = self.checkpointer.save_dir
                reason = f"a file of {folder} cannot be written: {error.strerror}"
                raise cannot_write(folder, reason) from None

    def before_train(self) -> None:
        super().before_train()
        if self.start_iter > 0:  # resumed
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks:
                if isinstance(hook, hooks.IterationTimer):
                    time_every_iteration(hook)  # as without the resume
                if isinstance(getattr(hook, "scheduler", None), LRScheduler):
                    _set_rates(hook.scheduler)
            for hook in self._hooks[self._hooks.index(self._checkpoints) + 1 :]:
                hook.after_step()

    def run_step(self) -> None:
        try:
            super().run_step()
        except NotFiniteError as error:
            folder = self.checkpointer.save_dir
            raise end_diverged(error, self.step, self.running_state, folder) from None

    def after_train(self) -> None:
        # In the log, not among the metrics, which a resumed run repeats to the last bit.
        peak = peak_memory_mib(next(self.step.model.parameters()).device)
        if peak is not None:
            logger.info("Peak memory: %.0f MiB", peak)
        self.storage.iter = self.iter
        # A failure in the last iteration looks like the end of training to Detectron2's hooks; the
        # collectives of an evaluation would wait for the other processes, which are elsewhere.
        finished = self.iter >= self.max_iter
        for hook in self._hooks:
            if finished or not isinstance(hook, hooks.EvalHook | hooks.BestCheckpointer):
                hook.after_train()

    @property
    def step(self) -> TrainStep:
        """What makes the steps: `_trainer` of Detectron2's trainers, or the trainer itself."""
        return self._trainer if hasattr(self, "_trainer") else self

    @property
    def evaluated_model(self) -> nn.Module:
        """The one of which checkpoints are: the average of the weights where there is an `ema`."""
        return self.ema.model if self.ema else self.step.model

    @property
    def _checkpoints(self) -> Checkpoints:
        return next(hook for hook in self._hooks if isinstance(hook, Checkpoints))


class Trainer(ResumableTrainer, DefaultTrainer):
    """A :class:`DefaultTrainer` for RoPE ViT detectors; its classmethods can be used alone."""

    build_train_loader = staticmethod(build_train_loader)
    build_test_loader = staticmethod(build_test_loader)
    build_optimizer = staticmethod(build_optimizer)
    build_evaluator = staticmethod(build_evaluator)

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a full config, with the keys of :func:`rope_vit_det.add_rope_vit_config`.

        Raises:
            InputError: what it asks for cannot be built; or `build_train_loader` gives whole
                batches where SOLVER.ACCUMULATE asks for micro-batches.
        """
        # DefaultTrainer's own __init__ cannot be told which step and which checkpointer to use.
        TrainerBase.__init__(self)
        self._writers: list[EventWriter] = []
        if cfg.SEED < 0:
            cfg = with_settings(cfg, {"SEED": settle_seed(cfg.SEED)})
        if not cfg.SOLVER.ACCUMULATE:  # nobody has measured
            world = comm.get_world_size()
            cfg = with_micro_batches(cfg, usual_number(cfg, world), world)
        settings = dict(leaves(cfg))
        # To Detectron2's scaling of batch and rate, a micro-batch is as good as a process.
        cfg = self.auto_scale_workers(cfg, comm.get_world_size() * cfg.SOLVER.ACCUMULATE)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        _check_loader(cfg, data_loader)
        self._trainer = build_train_step(cfg, wrap_model(model), data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        options: dict[str, Any] = {"settings": settings, "keep": cfg.SOLVER.KEEP_CHECKPOINTS}
        if cfg.SOLVER.EMA.ENABLED:
            self.ema = EMA(model, cfg.SOLVER.EMA.DECAY)
            options["trained_model"] = model
        self.prepare(model, cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, **options)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, and what the switches of SOLVER and TEST.AUG ask for."""
        solver, period = self.cfg.SOLVER, self.cfg.TEST.EVAL_PERIOD
        saver, best = self.checkpointer, solver.BEST_METRIC
        ours = [
            Checkpoints(saver, solver.CHECKPOINT_PERIOD),
            hooks.EvalHook(period, self._evaluate),
            best and BestCheckpointer(period, saver, best, solver.EARLY_STOPPING),
            self.cfg.TEST.AUG.ENABLED and hooks.EvalHook(0, self._evaluate_with_tta),
        ]
        theirs = super().build_hooks()  # which builds the writers, too
        # Before all that saves, evaluates or writes.
        built = [EventHistory(self._writers), self.ema]
        for hook in theirs:
            if isinstance(hook, hooks.EvalHook):
                built += ours
            elif isinstance(hook, hooks.PreciseBN) and self.ema:
                built.append(PreciseBN(hook, self.ema.model))
            elif not isinstance(hook, hooks.PeriodicCheckpointer):  # which is not in all processes
                built.append(hook)
        return [hook for hook in built if hook]

    def build_writers(self) -> list[EventWriter]:
        self._writers = super().build_writers()
        return self._writers

    def train(self) -> None:
        """Trains; ends early where SOLVER.EARLY_STOPPING says so."""
        try:
            super().train()
        except StopTraining as stop:
            logger.info("Training ends early at %s", stop)
            if self.cfg.TEST.AUG.ENABLED:
                self._evaluate_with_tta()

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluates on DATASETS.TEST, in slices where TEST.SLICE.ENABLED; see DefaultTrainer."""
        return super().test(cfg, in_slices(cfg, model), evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates under Detectron2's R-CNN test-time augmentation (scales and flips of TEST.AUG).

        Returns:
            The results, with "_TTA" behind the name of each task; files lie in
            OUTPUT_DIR/inference_TTA.
        """
        elsewhere = {"OUTPUT_DIR": os.path.join(cfg.OUTPUT_DIR, "inference_TTA")}
        results = cls.test(with_settings(cfg, elsewhere), GeneralizedRCNNWithTTA(cfg, model))
        return {f"{task}_TTA": result for task, result in results.items()}

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        return self._last_eval_results

    def _evaluate_with_tta(self) -> dict[str, Any]:
        results = self.test_with_tta(self.cfg, self.evaluated_model)
        self._last_eval_results |= results
        return results


def _check_loader(cfg: CfgNode, loader: Any) -> None:
    """What a loader that is not ours, such as Detectron2's, does not do, is said or refused."""
    if isinstance(getattr(loader, "batch_sampler", None), MicroBatchSampler):
        return
    ours = f"{build_train_loader.__module__}.build_train_loader"
    micro_batches = cfg.SOLVER.ACCUMULATE
    wanted = cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * micro_batches)
    size = getattr(loader, "batch_size", None) or wanted
    if micro_batches > 1 and size != wanted:
        raise InputError(
            f"SOLVER.ACCUMULATE is {micro_batches}, and the trainer's build_train_loader gives "
            f"batches of {size} images where a micro-batch has {wanted}: return "
            f"{ours}(cfg, mapper=..., sampler=...) there, or set SOLVER.ACCUMULATE 1"
        )
    logger.warning(
        "The trainer's build_train_loader does not return %s(...): resumed, its data starts over",
        ours,
    )


def _set_rates(scheduler: LRScheduler) -> None:
    """Has a schedule of before go on with the rates, and by the rule, that are set now."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    if isinstance(scheduler, LRMultiplier):  # of others, how far they are is theirs to know
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate

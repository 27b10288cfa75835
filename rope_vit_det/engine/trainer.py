"""Detectron2's default trainer with AdamW, layer decay, bf16 on any device, and evaluation."""

import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..checkpoint.checkpointer import DetectorCheckpointer
from ..checkpoint.running_state import RunningState
from ..config.keys import with_settings
from ..config.rules import leaves
from ..data.classes import dataset_classes
from ..data.loader import build_test_loader, build_train_loader
from ..data.workers import ShieldedLoader
from ..distributed.launch import wrap_model
from ..evaluation.evaluators import build_evaluator, results_folder
from ..evaluation.slicing import in_slices
from ..solver.learning_rates import learning_rate_table
from ..solver.optimizers import build_optimizer
from .hooks import EMA, BestCheckpointer, Checkpoints, EventHistory, PeakMemory, StopTraining
from .micro_batches import usual_number, with_micro_batches
from .resumable import ResumableTrainer
from .run_folder import settle_seed
from .train_step import build_train_step

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer, DefaultTrainer):
    """A :class:`DefaultTrainer` for RoPE ViT detectors; its classmethods can be used alone."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a full config, with the keys of :func:`rope_vit_det.add_rope_vit_config`.
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
        logger.info(
            "Learning rates, before warm-up and schedule:\n%s",
            learning_rate_table(model, optimizer),
        )
        data_loader = self.build_train_loader(cfg)
        trained, model = model, wrap_model(model)
        self._trainer = build_train_step(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = EMA(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        self.running_state = RunningState(trained)
        self.checkpointer = DetectorCheckpointer(
            self.evaluated_model,
            cfg.OUTPUT_DIR,
            classes=dataset_classes(cfg.DATASETS.TRAIN[0]),
            settings=settings,
            trained_model=self.ema and self.ema.trained_model,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            running_state=self.running_state,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> nn.Module:
        """The average of the weights where SOLVER.EMA.ENABLED, the trained model otherwise."""
        return self.ema.model if self.ema else self.model

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, and what the switches of SOLVER and TEST.AUG ask for."""
        solver, period = self.cfg.SOLVER, self.cfg.TEST.EVAL_PERIOD
        saver, best = self.checkpointer, solver.BEST_METRIC
        ours = [
            Checkpoints(saver, solver.CHECKPOINT_PERIOD, self.running_state),
            hooks.EvalHook(period, self._evaluate),
            best and BestCheckpointer(period, saver, best, solver.EARLY_STOPPING),
            self.cfg.TEST.AUG.ENABLED and hooks.EvalHook(0, self._evaluate_with_tta),
        ]
        theirs = super().build_hooks()  # which builds the writers, too
        # Before all that saves, evaluates or writes.
        built = [EventHistory(self._writers), self.ema, PeakMemory(self.cfg.MODEL.DEVICE)]
        for hook in theirs:
            if isinstance(hook, hooks.EvalHook):
                built += ours
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
                self._last_eval_results |= self._evaluate_with_tta()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ShieldedLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> ShieldedLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str = ""
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> "OrderedDict[str, Any]":
        """Evaluates on DATASETS.TEST, in slices where TEST.SLICE.ENABLED; see DefaultTrainer."""
        return super().test(cfg, in_slices(cfg, model), evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> "OrderedDict[str, Any]":
        """Evaluates under Detectron2's R-CNN test-time augmentation (scales and flips of TEST.AUG).

        Returns:
            The results, with "_TTA" behind the name of each task.
        """
        evaluators = [
            cls.build_evaluator(cfg, name, results_folder(cfg, name, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((task + "_TTA", result) for task, result in results.items())

    def _evaluate(self) -> "OrderedDict[str, Any]":
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        return self._last_eval_results

    def _evaluate_with_tta(self) -> "OrderedDict[str, Any]":
        return self.test_with_tta(self.cfg, self.evaluated_model)

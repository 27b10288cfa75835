"""Detectron2's default trainer with AdamW, layer decay, bf16 on any device, and evaluation."""

import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..data.large_scale_jitter import build_train_mapper
from ..evaluation.evaluators import build_evaluator
from .checkpoint import DetectorCheckpointer
from .optimizer import build_optimizer
from .train_step import build_train_step


class Trainer(DefaultTrainer):
    """A :class:`DefaultTrainer` for RoPE ViT detectors; its classmethods can be used alone."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a full config, with the keys of :func:`rope_vit_det.add_rope_vit_config`.
        """
        # DefaultTrainer's own __init__ cannot be told which step and which checkpointer to use.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer = build_train_step(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectorCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's, and test-time augmentation at the end where TEST.AUG.ENABLED."""
        built = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            evaluate = hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
            # Before the writers, which stand last on the main process.
            built.insert(len(built) - int(comm.is_main_process()), evaluate)
        return built

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=build_train_mapper(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str = ""
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> "OrderedDict[str, Any]":
        """Evaluates under Detectron2's R-CNN test-time augmentation (scales and flips of TEST.AUG).

        Returns:
            The results, with "_TTA" behind the name of each task.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((task + "_TTA", result) for task, result in results.items())

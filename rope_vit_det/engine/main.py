"""What a command line does once its config is checked: train, or evaluate."""

from collections import OrderedDict
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from .checkpoint import DetectorCheckpointer
from .trainer import Trainer


def train(cfg: CfgNode, *, resume: bool = False) -> "OrderedDict[str, Any] | None":
    """Trains, evaluates on the way and at the end.

    Args:
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        The last evaluation's results on the main process, None elsewhere.
    """
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", None)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> "OrderedDict[str, Any]":
    """Evaluates MODEL.WEIGHTS on DATASETS.TEST, under TTA as well where TEST.AUG.ENABLED.

    Args:
        resume: evaluate the last checkpoint in OUTPUT_DIR instead, if there is one.
    """
    model = Trainer.build_model(cfg)
    checkpointer = DetectorCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results

"""What a command line does once its config is checked: train, or evaluate."""

import argparse
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint.checkpointer import DetectorCheckpointer
from ..data.classes import dataset_classes
from ..distributed.launch import check_processes, count_processes, launch, starts_the_run
from .divergence import replay
from .micro_batches import agree_on_micro_batches, check_micro_batches, settle_micro_batches
from .rehearsal import rehearse_config
from .run_folder import check_output, clear_output, describe_output
from .setup import check_config, check_settings, load_config, setup
from .train_step import training_precision
from .trainer import Trainer

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace, *, trainer: type[Trainer] = Trainer) -> None:
    """Trains or evaluates as a command line says, in as many processes as it says.

    Args:
        args: of Detectron2's `default_argument_parser`, with or without the options of
            :func:`rope_vit_det.engine.command_line.add_own_data_options`.
        trainer: to train and evaluate by, a subclass with what is the user's own (at the top level
            of a module where there are several processes, which look it up there).

    Raises:
        InputError: for a wrong config, weights or data.
    """
    cfg = load_config(args)
    if getattr(args, "replay", ""):
        replay(trainer.build_model(cfg), args.replay, precision=training_precision(cfg))
        return
    if starts_the_run():
        # These first: they take no time, and the batch is divided by some of them.
        check_settings(cfg, eval_only=args.eval_only)
        check_processes(args, cfg.MODEL.DEVICE)
        if not args.eval_only:
            check_micro_batches(cfg, count_processes(args))
        check_output(cfg.OUTPUT_DIR, args)
        check_config(cfg, eval_only=args.eval_only, resume=args.resume)
        rehearse_config(cfg, args, trainer)
        cfg = settle_micro_batches(cfg, args, trainer)
        clear_output(cfg.OUTPUT_DIR, args)
    launch(_run_in_process, args, cfg, trainer, device=cfg.MODEL.DEVICE)


def train(
    cfg: CfgNode, *, resume: bool = False, trainer: type[Trainer] = Trainer
) -> dict[str, Any] | None:
    """Trains, evaluates on the way and at the end.

    Args:
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        The last evaluation's results on the main process, None elsewhere.
    """
    built = trainer(cfg)
    built.resume_or_load(resume=resume)
    built.train()
    return getattr(built, "_last_eval_results", None)


def evaluate(
    cfg: CfgNode, *, resume: bool = False, trainer: type[Trainer] = Trainer
) -> dict[str, Any]:
    """Evaluates MODEL.WEIGHTS on DATASETS.TEST, under TTA as well where TEST.AUG.ENABLED.

    Args:
        resume: evaluate the last checkpoint in OUTPUT_DIR instead, if there is one.
    """
    model = trainer.build_model(cfg)
    classes = dataset_classes(cfg.DATASETS.TEST[0])
    checkpointer = DetectorCheckpointer(model, cfg.OUTPUT_DIR, classes=classes, whole=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _run_in_process(args: argparse.Namespace, cfg: CfgNode, trainer: type[Trainer]) -> None:
    cfg = setup(agree_on_micro_batches(cfg), args)
    (evaluate if args.eval_only else train)(cfg, resume=args.resume, trainer=trainer)
    logger.info(describe_output(cfg.OUTPUT_DIR))

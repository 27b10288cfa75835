"""From what a training left, or a config and a checkpoint, to a detector with class names."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.checkpoint_files import FINAL, LAST, last_checkpoint
from ..checkpoint.checkpointer import BEST, DetectorCheckpointer, classes_of
from ..config.run_config import read_run_config
from ..data.classes import Classes
from ..data.coco_file import read_coco
from ..data.validation.check import check_count
from ..errors import InputError
from ..weights.load import PREFIXES

# What is not in the classes' keys: thresholds below which detections are dropped.
_THRESHOLDS = ("ROI_HEADS", "RETINANET")


def read_detector_config(
    config_or_dir: str | os.PathLike,
    weights: str | os.PathLike | None,
    opts: Sequence[str],
    threshold: float,
    settled: Mapping[str, str],
) -> CfgNode:
    """The config of a trained detector, MODEL.WEIGHTS set.

    Args:
        config_or_dir: see :func:`~rope_vit_det.config.run_config.read_run_config`.
        weights: a checkpoint; None: the best, final or last one of the folder, or what the config
            names.
        opts: KEY VALUE pairs.
        threshold: least score of a detection.
        settled: keys that the caller sets, whatever `opts` say, and what to do instead.

    Raises:
        InputError: there is no config, or no checkpoint; `opts` would have no effect.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"the confidence threshold must be from 0 to 1, got {threshold}")
    by_threshold = "give --confidence-threshold (in Python, threshold)"
    remedies = {f"MODEL.{head}.SCORE_THRESH_TEST": by_threshold for head in _THRESHOLDS}
    remedies |= settled
    if weights is not None:
        remedies["MODEL.WEIGHTS"] = "--weights is given too"
    for key in opts[::2]:
        if key in remedies:
            raise InputError(f"{key} would have no effect among --opts: {remedies[key]}")
    cfg, file = read_run_config(config_or_dir, opts)
    path = Path(config_or_dir)
    if weights is None and path.is_dir() and "MODEL.WEIGHTS" not in opts:
        weights = _find_checkpoint(path)
    if weights is not None:
        cfg.MODEL.WEIGHTS = os.fspath(weights)
    if not cfg.MODEL.WEIGHTS or cfg.MODEL.WEIGHTS.startswith(PREFIXES):
        named = f"{cfg.MODEL.WEIGHTS} is a backbone alone" if cfg.MODEL.WEIGHTS else "none is named"
        raise InputError(f"{file}: a trained detector's checkpoint is needed, {named}; --weights")
    for head in _THRESHOLDS:
        cfg.MODEL[head].SCORE_THRESH_TEST = float(threshold)
    return cfg


def load_detector(cfg: CfgNode, categories: str | os.PathLike | None) -> tuple[nn.Module, Classes]:
    """The detector of MODEL.WEIGHTS, ready for inference, and its classes.

    Args:
        categories: a COCO file whose categories are the classes; None: the checkpoint says them.

    Raises:
        InputError: the checkpoint cannot be read, is not the config's whole detector, or says no
            class names.
    """
    model = build_model(cfg).eval()
    rest = DetectorCheckpointer(model, whole=True).load(cfg.MODEL.WEIGHTS)
    source = str(categories or cfg.MODEL.WEIGHTS)
    classes = _read_categories(categories) if categories else classes_of(rest)
    if classes is None:
        raise InputError(
            f"{source} does not hold the names of its classes; name the COCO file that it was "
            "trained on with --categories"
        )
    check_count(cfg, source, len(classes["names"]))
    return model, classes


def _find_checkpoint(folder: Path) -> Path:
    for path in (folder / BEST, folder / FINAL, last_checkpoint(folder)):
        if path and path.is_file():
            return path
    raise InputError(f"{folder} has no checkpoint ({BEST}, {FINAL}, {LAST}); --weights")


def _read_categories(path: str | os.PathLike) -> Classes:
    categories = read_coco(path, needed=("categories",))["categories"]
    try:
        # Detectron2 numbers classes in the order of their ids.
        ordered = sorted((int(each["id"]), str(each["name"])) for each in categories)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: its categories are not COCO's, with 'id' and 'name'") from None
    return {"names": [name for _, name in ordered], "ids": [number for number, _ in ordered]}

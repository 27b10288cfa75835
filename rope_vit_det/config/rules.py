"""Values of Detectron2's keys that it would take without a word: a table of key and rule.

What Detectron2 itself refuses, such as a name that no registry has, is left to the rehearsal of a
run (:mod:`rope_vit_det.engine.rehearsal`); what this project's own keys say together is checked in
:mod:`.keys`.
"""

import re
from typing import Any

import torch
from detectron2.config import CfgNode

from ..errors import InputError
from ..utils.arguments import Rule, is_number, is_whole_number, number, several, whole
from .keys import MIN_SLICE, check_key, default_config, get_key

_Table = tuple[tuple[Rule, str], ...]  # keys in full, with spaces between


_SHARE, _POSITIVE = number(0, 1), number(0, or_least=False)
_PART = number(0, 1, or_most=False)
_NAMES = several(Rule(lambda value: isinstance(value, str), "the name of a registered dataset"), 0)
_EXPECTED = Rule(
    lambda value: len(value) == 4 and all(map(is_number, value[2:])),
    "a list of task, metric, value and tolerance, such as ['bbox', 'AP', 38.5, 0.2]",
)
_RISING = Rule(
    lambda value: several(whole(1), 0).holds(value) and list(value) == sorted(set(value)),
    "iterations of 1 or more in rising order",
)
# As many channels as the stem has, or one that stands for all.
_FORMAT = Rule(lambda value: value in ("RGB", "BGR", "HSV", "YCbCr", "L"), "'RGB', 'BGR', 'HSV'")
_SEED = Rule(
    lambda value: is_whole_number(value, -(2**31)) and value < 2**31,
    "a whole number below 2147483648 (negative: a random one)",
)
_ALL_OR_MORE = Rule(lambda value: value == -1 or is_whole_number(value, 1), "1 or more, or -1: all")
_ALWAYS: _Table = (
    (_FORMAT, "INPUT.FORMAT"),
    (several(number(float("-inf")), 3, 3), "MODEL.PIXEL_MEAN"),
    (several(_POSITIVE, 3, 3), "MODEL.PIXEL_STD"),
    (whole(0, " (0: images as they are)"), "INPUT.MIN_SIZE_TEST"),
    (whole(0), "DATALOADER.NUM_WORKERS"),
    (_NAMES, "DATASETS.TRAIN DATASETS.TEST"),
    (_ALL_OR_MORE, "TEST.DETECTIONS_PER_IMAGE"),
    (several(whole(1)), "TEST.AUG.MIN_SIZES"),
    (several(_EXPECTED, 0), "TEST.EXPECTED_RESULTS"),
    (
        whole(1),
        "INPUT.MAX_SIZE_TEST TEST.AUG.MAX_SIZE MODEL.ROI_HEADS.NUM_CLASSES "
        "MODEL.RETINANET.NUM_CLASSES MODEL.RETINANET.TOPK_CANDIDATES_TEST "
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TEST",
    ),
    (
        _SHARE,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST MODEL.ROI_HEADS.NMS_THRESH_TEST MODEL.RPN.NMS_THRESH "
        "MODEL.RETINANET.SCORE_THRESH_TEST MODEL.RETINANET.NMS_THRESH_TEST",
    ),
    (_PART, "MODEL.ANCHOR_GENERATOR.OFFSET"),
)
# This project's own, whether they are switched on or not.
_OURS: _Table = (
    (whole(1), "INPUT.LSJ.IMAGE_SIZE"),
    (whole(0), "SOLVER.ACCUMULATE SOLVER.EARLY_STOPPING SOLVER.KEEP_CHECKPOINTS"),
    (whole(MIN_SLICE), "TEST.SLICE.SIZE"),
    (_PART, "TEST.SLICE.OVERLAP SOLVER.EMA.DECAY"),
    (number(0, 1, or_least=False), "SOLVER.LAYER_DECAY"),
)
_TRAINING: _Table = (
    (several(whole(1)), "INPUT.MIN_SIZE_TRAIN"),
    (_SEED, "SEED"),
    (whole(0, " (0: at the end only)"), "TEST.EVAL_PERIOD"),
    (whole(0), "VIS_PERIOD SOLVER.REFERENCE_WORLD_SIZE SOLVER.WARMUP_ITERS"),
    (
        whole(1),
        "INPUT.MAX_SIZE_TRAIN SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER SOLVER.CHECKPOINT_PERIOD "
        "SOLVER.NUM_DECAYS MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE MODEL.RPN.BATCH_SIZE_PER_IMAGE "
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.POST_NMS_TOPK_TRAIN",
    ),
    (_SHARE, "MODEL.ROI_HEADS.POSITIVE_FRACTION MODEL.RPN.POSITIVE_FRACTION"),
    (number(0), "DATALOADER.REPEAT_THRESHOLD SOLVER.WARMUP_FACTOR SOLVER.WEIGHT_DECAY"),
    (
        _POSITIVE,
        "SOLVER.BASE_LR SOLVER.GAMMA SOLVER.CLIP_GRADIENTS.CLIP_VALUE "
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    ),
    (_RISING, "SOLVER.STEPS"),
)


def check_rules(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Checks the keys of the table.

    Args:
        eval_only: keys of training are not read.

    Raises:
        InputError: names the key, its value and the allowed ones.
    """
    solver = cfg.SOLVER
    last = (number(0, solver.BASE_LR), "SOLVER.BASE_LR_END")
    cosine = (last,) if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" else ()
    always = (*_ALWAYS, *_OURS)
    for rule, keys in always if eval_only else (*always, *_TRAINING, *cosine):
        for key in keys.split():
            is_on = get_key(cfg, key.rpartition(".")[0] or "SOLVER").get("ENABLED", True)
            if is_on or (rule, keys) in _OURS:
                check_key(cfg, key, rule.holds(get_key(cfg, key)), rule.allowed)
    if cfg.TEST.EXPECTED_RESULTS and len(cfg.DATASETS.TEST) != 1:
        raise InputError(
            "TEST.EXPECTED_RESULTS is compared with the results of one dataset, and DATASETS.TEST "
            f"is {cfg.DATASETS.TEST!r}; name one there, or set TEST.EXPECTED_RESULTS []"
        )


def check_nothing_is_none(cfg: CfgNode) -> None:
    """Refuses None where Detectron2 takes it at first, and fails on it later.

    Raises:
        InputError: names the key, and the type that it takes.
    """
    for key, default in leaves(default_config()):
        if get_key(cfg, key) is None and default is not None:
            kind = type(default).__name__
            raise InputError(f"{key} is None; allowed: type {kind}, such as {default!r}")


def leaves(cfg: CfgNode, path: str = "") -> list[tuple[str, Any]]:
    """All keys in full, with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in cfg.items():
        inner = isinstance(value, CfgNode)
        found += leaves(value, f"{path}{key}.") if inner else [(path + key, value)]
    return found


def check_device(cfg: CfgNode) -> None:
    """
    Raises:
        InputError: MODEL.DEVICE is none, or one that this machine lacks.
    """
    name, gpus = cfg.MODEL.DEVICE, torch.cuda.device_count()
    known = re.fullmatch(r"(?:cuda|cpu)(?::(\d+))?", str(name))
    allowed = "'cuda' (without a GPU: the CPU) or 'cpu'"
    check_key(cfg, "MODEL.DEVICE", known is not None, allowed)
    if gpus and known and int(known[1] or 0) >= gpus:
        raise InputError(f"MODEL.DEVICE is {name!r}; this machine has {gpus} GPUs")

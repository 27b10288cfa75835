"""Detectron2's keys of input, solver and test: values that it would stumble over later, or ignore.

The heads' are in :mod:`.check_heads`, this project's own in :mod:`rope_vit_det.config`.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from ..utils.arguments import is_number, is_whole_number
from .keys import add_rope_vit_config, check_key, get_key


class Rule(NamedTuple):
    """What a key may be, and how a message says so."""

    holds: Callable[[Any], bool]
    allowed: str


def whole(least: int, meaning: str = "") -> Rule:
    text = f"a whole number of {least} or more"
    return Rule(lambda value: is_whole_number(value, least), text + meaning)


def one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, ", ".join(map(repr, names)))


def number(least: float, most: float = float("inf"), *, or_least: bool = True) -> Rule:
    """A number from `least`, or above it, to `most`."""
    text = f"{least} or more" if or_least else f"above {least}"
    text += "" if most == float("inf") else f", up to {most}"
    return Rule(
        lambda value: is_number(value) and least <= value <= most and (or_least or value > least),
        text,
    )


def several(rule: Rule, length: int | None = None, least: int = 1) -> Rule:
    """A list of values that follow a rule each."""
    wanted = f"a list of {length}" if length else f"a list of {least} or more"
    return Rule(
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) >= least
            and length in (None, len(value))
            and all(map(rule.holds, value))
        ),
        f"{wanted}, each: {rule.allowed}",
    )


_NAME = Rule(lambda value: isinstance(value, str), "the name of a registered dataset")
_INPUT = {
    # As many channels as the stem has, or one that stands for all.
    "INPUT.FORMAT": one_of("RGB", "BGR", "HSV", "YCbCr", "L"),
    "MODEL.PIXEL_MEAN": several(number(float("-inf")), 3),
    "MODEL.PIXEL_STD": several(number(0, or_least=False), 3),
    "INPUT.MIN_SIZE_TEST": whole(0, " (0: images as they are)"),
    "INPUT.MAX_SIZE_TEST": whole(1),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "DATALOADER.NUM_WORKERS": whole(0),
    "DATASETS.TRAIN": several(_NAME, least=0),
    "DATASETS.TEST": several(_NAME, least=0),
    "TEST.DETECTIONS_PER_IMAGE": Rule(
        lambda value: value == -1 or is_whole_number(value, 1), "1 or more, or -1: all"
    ),
}
_TRAINING_INPUT = {
    "INPUT.MIN_SIZE_TRAIN": several(whole(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": whole(1),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "DATALOADER.REPEAT_THRESHOLD": number(0),
    "SEED": Rule(
        lambda value: is_whole_number(value, -(2**31)) and value < 2**31,
        "a whole number below 2147483648 (negative: a random one)",
    ),
    "VIS_PERIOD": whole(0),
}
_SOLVER = {
    "SOLVER.IMS_PER_BATCH": whole(1),
    "SOLVER.REFERENCE_WORLD_SIZE": whole(0),
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.CHECKPOINT_PERIOD": whole(1),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.WARMUP_FACTOR": number(0),
    "SOLVER.BASE_LR": number(0, or_least=False),
    "SOLVER.WEIGHT_DECAY": number(0),
    "SOLVER.GAMMA": number(0, or_least=False),
    "SOLVER.STEPS": several(whole(1), least=0),
    "SOLVER.NUM_DECAYS": whole(1),
    "TEST.EVAL_PERIOD": whole(0, " (0: at the end only)"),
}
_CLIPPING = {
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(0, or_least=False),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": number(0, or_least=False),
}
_AUGMENTED_TEST = {
    "TEST.AUG.MIN_SIZES": several(whole(1)),
    "TEST.AUG.MAX_SIZE": whole(1),
}
_SIDES = several(number(0, 1, or_least=False), 2)
_PIXELS = several(whole(1), 2)
_CROPS = {
    "relative": _SIDES,
    "relative_range": _SIDES,
    "absolute": _PIXELS,
    "absolute_range": _PIXELS,
}


def check_rules(cfg: CfgNode, rules: dict[str, Rule]) -> None:
    """
    Raises:
        InputError: a key does not follow its rule.
    """
    for key, rule in rules.items():
        check_key(cfg, key, rule.holds(get_key(cfg, key)), rule.allowed)


def check_nothing_is_none(cfg: CfgNode) -> None:
    """Refuses None where Detectron2 takes it at first, and fails on it later.

    Raises:
        InputError: names the key, and the type that it takes.
    """
    defaults = get_cfg()
    add_rope_vit_config(defaults)
    _check_nothing_is_none(cfg, defaults, "")


def _check_nothing_is_none(cfg: CfgNode, defaults: CfgNode, path: str) -> None:
    for key, default in defaults.items():
        if isinstance(default, CfgNode):
            _check_nothing_is_none(cfg[key], default, f"{path}{key}.")
        elif cfg[key] is None and default is not None:
            kind = type(default).__name__
            raise InputError(f"{path}{key} is None; allowed: type {kind}, such as {default!r}")


def check_device(cfg: CfgNode) -> None:
    """
    Raises:
        InputError: MODEL.DEVICE is none, or one that this machine lacks.
    """
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = device is not None and device.type in ("cuda", "cpu")
    check_key(cfg, "MODEL.DEVICE", known, "'cuda' (this falls to the CPU without a GPU) or 'cpu'")
    gpus = torch.cuda.device_count()
    if gpus and device.index is not None and device.index >= gpus:
        raise InputError(f"MODEL.DEVICE is {name!r}; this machine has {gpus} GPUs")


def check_keys(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Checks Detectron2's keys of input, solver and test, and that OUTPUT_DIR can be written.

    Args:
        eval_only: keys of training are not read.

    Raises:
        InputError: names the key, its value and the allowed ones.
    """
    check_rules(cfg, _INPUT)
    _check_test(cfg)
    if not eval_only:
        check_rules(cfg, _TRAINING_INPUT | _SOLVER)
        _check_augmentation(cfg)
        _check_schedule(cfg)
        if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            check_rules(cfg, _CLIPPING)
    _check_output(cfg.OUTPUT_DIR)


def _check_augmentation(cfg: CfgNode) -> None:
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes!r}; allowed with MIN_SIZE_TRAIN_SAMPLING 'range': two "
            "sizes, the least and the most"
        )
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        check_rules(cfg, {"INPUT.CROP.TYPE": one_of(*_CROPS)})
        check_rules(cfg, {"INPUT.CROP.SIZE": _CROPS[crop.TYPE]})


def _check_schedule(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise InputError(f"SOLVER.STEPS is {solver.STEPS!r}; allowed: iterations in rising order")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        check_rules(cfg, {"SOLVER.BASE_LR_END": number(0, solver.BASE_LR)})


def _check_test(cfg: CfgNode) -> None:
    aug, model = cfg.TEST.AUG, cfg.MODEL
    if aug.ENABLED:
        check_rules(cfg, _AUGMENTED_TEST)
        plain = model.META_ARCHITECTURE == "GeneralizedRCNN"
        if not plain or model.KEYPOINT_ON or model.LOAD_PROPOSALS:
            raise InputError(
                f"TEST.AUG.ENABLED is True with MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}, "
                f"KEYPOINT_ON {model.KEYPOINT_ON} and LOAD_PROPOSALS {model.LOAD_PROPOSALS}; "
                "Detectron2's test-time augmentation takes a GeneralizedRCNN without keypoints and "
                "loaded proposals: set TEST.AUG.ENABLED False"
            )
    for expected in cfg.TEST.EXPECTED_RESULTS:
        task_metric = isinstance(expected, list | tuple) and len(expected) == 4
        if not task_metric or not all(map(is_number, expected[2:])):
            raise InputError(
                f"TEST.EXPECTED_RESULTS has {expected!r}; allowed: lists of task, metric, value "
                "and tolerance, such as ['bbox', 'AP', 38.5, 0.2]"
            )


def _check_output(folder: str) -> None:
    try:
        if "://" in folder:
            PathManager.mkdirs(folder)
        else:  # PathManager takes a file for a folder
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror or error) from None
    if "://" not in folder and not os.access(folder, os.W_OK):
        raise _unwritable(folder, "no permission")


def _unwritable(folder: str, reason: object) -> InputError:
    return InputError(f"OUTPUT_DIR {folder!r} cannot be written ({reason}); name another folder")

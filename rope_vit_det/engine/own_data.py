"""The options by which a command line names data of the user's own."""

import argparse

from detectron2.config import CfgNode

from ..data.own import TRAIN, VAL, own_datasets, register_own_data, use_own_data
from ..errors import InputError

_OPTIONS = {
    "train_json": "annotations to train on, in COCO's format",
    "train_images": "folder of their images",
    "val_json": "annotations to evaluate on, in COCO's format",
    "val_images": "folder of their images",
}


def add_own_data_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --train-json, --train-images, --val-json and --val-images, short for DATASETS.OWN."""
    group = parser.add_argument_group("your own data, in place of DATASETS.TRAIN and TEST")
    for name, text in _OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), default="", metavar="PATH", help=text)
    return parser


def add_own_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Registers the data that the options, or DATASETS.OWN, name, and fits the config to it.

    Args:
        cfg: changed in place.
        args: with or without the options of :func:`add_own_data_options`.

    Raises:
        InputError: a path is missing, or the options do not go together.
    """
    for name in _OPTIONS:
        if getattr(args, name, ""):
            cfg.DATASETS.OWN[name.upper()] = getattr(args, name)
    datasets = own_datasets(cfg)
    if VAL in datasets and TRAIN not in datasets and not args.eval_only:
        raise InputError(
            "--val-json without --train-json: name both to train, or add --eval-only to evaluate"
        )
    use_own_data(cfg)
    register_own_data(cfg)

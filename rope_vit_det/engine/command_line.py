"""The command line of the training tools: Detectron2's, with --config-file as often as wanted."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ..errors import InputError

# Detectron2, and what needs it, is imported where it is used: --help would wait for it.
if TYPE_CHECKING:
    from detectron2.config import CfgNode

_EXAMPLES = """\
examples:
  %(prog)s --config-file FILE --num-gpus 8
  %(prog)s --config-file FILE {opts}
two machines, each with its rank:
  %(prog)s --config-file FILE --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
  %(prog)s --config-file FILE --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
"""


def argument_parser(
    epilog: str | None = None, *, opts: str = "MODEL.WEIGHTS model.pth SOLVER.BASE_LR 0.001"
) -> argparse.ArgumentParser:
    """The options of Detectron2's `default_argument_parser`, and --replay and --overwrite.

    `args.config_file` is a list, in the order given.

    Args:
        epilog: printed below the options; None: examples.
        opts: overrides in one of these.
    """
    parser = argparse.ArgumentParser(
        epilog=epilog or _EXAMPLES.replace("{opts}", opts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the last checkpoint, where there is one")
    add("--eval-only", action="store_true", help="evaluate, do not train")
    add("--num-gpus", type=int, default=1, help="of each machine (default: 1)")
    add("--num-machines", type=int, default=1, help="in all (default: 1)")
    add("--machine-rank", type=int, default=0, help="of this machine among them, from 0")
    # Detectron2's default, of a port for each user; on one machine `launch` takes a free one.
    user = os.getuid() if sys.platform != "win32" else 1
    port = 2**15 + 2**14 + hash(user) % 2**14
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the processes meet")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, or key=value of a LazyConfig")
    add_config_option(parser)
    replay = "no training: the losses of a batch that ended a run, and the first module at fault"
    add("--replay", default="", metavar="FILE", help=replay)
    overwrite = "train in an output folder that holds an earlier training, which is moved aside"
    add("--overwrite", action="store_true", help=overwrite)
    no_rehearsal = "begin without trying everything once before (docs/long_runs.md)"
    add("--no-rehearsal", action="store_true", help=no_rehearsal)
    return parser


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Adds --config-file; `args.config_file` is a list, in the order given."""
    parser.add_argument(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="path of a config file, or its name in configs/ or in Detectron2's model zoo; yaml "
        "files may be several, which merge in the order given",
    )


def pixels(text: str) -> tuple[int, int]:
    """The (height, width) of a command line: "1024", a square, or "800x1333"."""
    height, _, width = text.partition("x")
    size = (int(height), int(width or height))
    if min(size) < 1:
        raise ValueError(f"{text}: a side of no pixels")
    return size


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


def add_own_data(cfg: "CfgNode", args: argparse.Namespace) -> None:
    """Registers the data that the options, or DATASETS.OWN, name, and fits the config to it.

    Args:
        cfg: changed in place.
        args: with or without the options of :func:`add_own_data_options`.

    Raises:
        InputError: a path is missing, or the options do not go together.
    """
    from ..data.own import TRAIN, VAL, own_datasets, register_own_data, use_own_data

    given = [name.upper() for name in _OPTIONS if getattr(args, name, "")]
    for key in given:
        cfg.DATASETS.OWN[key] = getattr(args, key.lower())
    datasets = own_datasets(cfg)
    if VAL in datasets and TRAIN not in datasets and not getattr(args, "eval_only", False):
        raise InputError(
            "--val-json without --train-json (DATASETS.OWN.VAL_JSON, .TRAIN_JSON): name both to "
            "train, or add --eval-only to evaluate"
        )
    use_own_data(cfg, eval_only=getattr(args, "eval_only", False), options=given)
    register_own_data(cfg)

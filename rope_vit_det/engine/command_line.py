"""The command line of the training tools: Detectron2's, with --config-file as often as wanted."""

import argparse
import logging
import os
from pathlib import Path

import detectron2
from detectron2.engine import default_argument_parser

from ..errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
# In the package where it is installed, beside it in its sources.
CONFIGS = next(
    folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()
)
# Not from the import of detectron2.model_zoo, which warns about its use of pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's `default_argument_parser`, and --overwrite.

    `args.config_file` is a list, in the order given.
    """
    detectron2s = default_argument_parser(epilog)
    parser = argparse.ArgumentParser(
        parents=[detectron2s],
        conflict_handler="resolve",  # ours takes the place of the option of that name
        epilog=detectron2s.epilog,
        formatter_class=detectron2s.formatter_class,
    )
    add_config_option(parser)
    parser.add_argument(
        "--replay",
        default="",
        metavar="FILE",
        help="do not train: compute the losses of a batch that ended a run with a loss that was "
        "not finite, and name the first module whose output was not",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train in an output folder that holds an earlier training, which is moved aside",
    )
    return parser


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Adds --config-file; `args.config_file` is a list, in the order given."""
    parser.add_argument(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="path of a config file, or its name in configs/ or in Detectron2's model zoo; may be "
        "repeated: files merge in the order given",
    )


def pixels(text: str) -> tuple[int, int]:
    """The (height, width) of a command line: "1024", a square, or "800x1333"."""
    height, _, width = text.partition("x")
    size = (int(height), int(width or height))
    if min(size) < 1:
        raise ValueError(f"{text}: a side of no pixels")
    return size


def config_files(args: argparse.Namespace) -> list[str]:
    """What --config-file named, whether `args` are of :func:`argument_parser` or Detectron2's."""
    given = args.config_file
    return [given] if isinstance(given, str) and given else list(given)


def log_config_files(args: argparse.Namespace) -> None:
    """Writes the files into the log, as Detectron2's `default_setup` does with one."""
    for name in config_files(args):
        path = find_config_file(name)
        logger.info("Contents of --config-file %s:\n%s", path, Path(path).read_text("utf-8"))


def without_config_files(args: argparse.Namespace) -> argparse.Namespace:
    """The same for `default_setup`, which knows only one file."""
    return argparse.Namespace(**vars(args) | {"config_file": ""})


def find_config_file(name: str) -> str:
    """The path of a config file: as given, or else by its name in `configs/` or Detectron2's zoo.

    Args:
        name: such as "configs/demo.yaml" or "demo.yaml", wherever one is.

    Raises:
        InputError: there is none; names close matches.
    """
    if os.path.isfile(name):
        return name
    for path in (CONFIGS / name.removeprefix("configs/"), ZOO / name) if name else ():
        if path.is_file():
            return str(path)
    known = [
        path.relative_to(folder).as_posix()
        for folder in (CONFIGS, ZOO)
        for path in folder.rglob("*.*")
    ]
    raise InputError(
        f"--config-file {name}: no such file, neither here nor in configs/ or Detectron2's zoo"
        + did_you_mean(name, known)
    )

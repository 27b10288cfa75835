"""The config of a training that has been."""

import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..errors import InputError
from .setup import merge_config


def read_run_config(
    config_or_dir: str | os.PathLike, opts: Sequence[str] = ()
) -> tuple[CfgNode, Path]:
    """The config, and the file that it was read from.

    Args:
        config_or_dir: a yaml, or an OUTPUT_DIR, in which Detectron2 leaves config.yaml.
        opts: KEY VALUE pairs over it.

    Raises:
        InputError: there is none; it is a LazyConfig; it does not fit.
    """
    path = Path(config_or_dir)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        what = f"{path} has no config.yaml" if path.is_dir() else f"{path}: no such file or folder"
        raise InputError(f"{what}; name a config, or the OUTPUT_DIR of a training")
    if file.suffix == ".py" or b"_target_:" in file.read_bytes():
        raise InputError(
            f"{file} is a LazyConfig, which is not read here; name the yaml config of the same "
            "detector, and the checkpoint beside it"
        )
    return merge_config([str(file)], opts), file

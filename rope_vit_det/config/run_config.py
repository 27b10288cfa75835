"""From files and KEY VALUE pairs to a config; the config of a training that has been."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg

from ..errors import InputError, did_you_mean
from ..weights.load import as_birder_url
from .keys import add_rope_vit_config
from .rules import check_device, check_nothing_is_none, leaves
from .yaml_files import merge_from_yaml

PACKAGE = Path(__file__).resolve().parents[1]
# In the package where it is installed, beside it in its sources.
CONFIGS = next(
    folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()
)
# Not from the import of detectron2.model_zoo, which warns about its use of pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def read_run_config(
    config_or_dir: str | os.PathLike[str], opts: Sequence[str] = ()
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


def config_files(args: argparse.Namespace) -> list[str]:
    """What --config-file named, whether `args` are of :func:`argument_parser` or Detectron2's."""
    given = args.config_file
    return [given] if isinstance(given, str) and given else list(given)


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


def merge_config(paths: Sequence[str], opts: Sequence[str] = ()) -> CfgNode:
    """A config of yaml files, in this order, and KEY VALUE pairs; no data is looked at.

    Raises:
        InputError: as :func:`load_config` does.
    """
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    for path in paths:
        merge(cfg, path, partial(merge_from_yaml, cfg), path)
    merge(cfg, "command line", cfg.merge_from_list, list(opts))
    check_nothing_is_none(cfg)
    check_device(cfg)
    if not torch.cuda.device_count():  # is_available() would keep a fork from CUDA
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = as_birder_url(cfg.MODEL.WEIGHTS)
    return cfg


# As yacs says them.
_UNKNOWN = re.compile(r"Non-existent (?:config )?key: (\S*)")
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<wanted>.*)'> vs\. <class '(?P<given>.*)'>\) with values "
    r"\((?P<values>.*)\) for config key: (?P<key>\S+)",
    re.DOTALL,
)


def merge(cfg: CfgNode, source: str, how: Callable[[Any], None], value: Any) -> None:
    """Calls `how(value)`, which merges into the config.

    Args:
        source: of the value, for messages.

    Raises:
        InputError: the value does not fit.
    """
    try:
        how(value)
    except InputError:
        raise
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
        reason = str(error.args[0] if error.args else error)
        raise InputError(f"{source}: {_explain(cfg, reason)}") from None


def _explain(cfg: CfgNode, reason: str) -> str:
    unknown, mismatch = _UNKNOWN.search(reason), _MISMATCH.search(reason)
    if unknown:
        key = unknown[1]
        known = {leaf.rsplit(".", above)[0] for leaf, _ in leaves(cfg) for above in range(5)}
        return f"there is no key {key}{did_you_mean(key, known)}"
    if mismatch:
        wanted, given = (mismatch[kind].rpartition(".")[2] for kind in ("wanted", "given"))
        key = mismatch["key"]
        if wanted == "CfgNode":
            return f"{key} is a section: set the keys in it, not the whole"
        value = " ".join(mismatch["values"].rpartition(" vs. ")[2].split())
        return f"{key} takes a {wanted}, and {value!r} is a {given}"
    return " ".join(reason.split())

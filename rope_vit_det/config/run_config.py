"""From files and KEY VALUE pairs to a config; the config of a training that has been.

Detectron2's `merge_from_file` lets a yaml call any Python function by a tag. Its own RetinaNet
needs one, so tags are honoured in the files that Detectron2 installs, and nowhere else.
"""

import argparse
import importlib
import io
import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import detectron2
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..errors import InputError, did_you_mean
from ..weights.load import as_birder_url
from .keys import default_config
from .rules import check_device, check_nothing_is_none, leaves

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """A folder of files: in the package where it is installed, beside it in its sources."""
    return next(path for path in (PACKAGE / name, PACKAGE.parent / name) if path.is_dir())


CONFIGS = shipped("configs")
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
    cfg = default_config()
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


def merge_from_yaml(cfg: CfgNode, path: str) -> None:
    """`cfg.merge_from_file(path)`, in which no file outside Detectron2 can run code.

    Where the yaml is for a project of Detectron2's, the keys of that project are added first.

    Args:
        cfg: changed in place.
        path: a yaml config; the `_BASE_` files it names are held to the same.

    Raises:
        InputError: names the file, and the line where there is one: it has a Python tag, is
            missing, no yaml, or no config.
        KeyError, ValueError, AssertionError, TypeError: as Detectron2 reports unknown keys and
            values of another type.
    """
    try:
        loaded = _CheckedFiles.load_yaml_with_base(path)
    except RecursionError:
        raise InputError(f"{path}: _BASE_ leads back to itself, or nests too deeply") from None
    _check_names(loaded, path)
    # Detectron2 guesses the version where there is none, and says so on every run.
    if type(loaded.setdefault("VERSION", cfg.VERSION)) is not int:
        raise InputError(f"{path}: VERSION is {loaded['VERSION']!r}; allowed: {cfg.VERSION}")
    add_project_config(cfg, loaded, path)
    # An attribute of this object goes before the method of its class, which stays as it is; all
    # the rest (versions, types) is Detectron2's. No key can clash: yacs keeps attributes apart from
    # the entries.
    with patch.dict(cfg.__dict__, load_yaml_with_base=lambda *args, **kwargs: loaded):
        cfg.merge_from_file(path)


class _CheckedFiles(CfgNode):
    """Lends Detectron2's loader its own rule: only in a file of its own, a tag may run code."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[Any, Any]:
        # Links are followed first: what counts is where a file really lies.
        path = os.path.realpath(PathManager.get_local_path(filename))
        try:
            loaded = super().load_yaml_with_base(filename, path.startswith(_detectron2_folders()))
        except yaml.YAMLError as error:
            raise _refusal(filename, error) from None
        except (TypeError, AttributeError):  # of a _BASE_ that is no path, or of no content
            loaded = None
        if not isinstance(loaded, dict):
            raise InputError(
                f"{filename} is not a config: it should hold lines of KEY: VALUE, and in _BASE_ a "
                "path, or a list of them"
            )
        return loaded

    @classmethod
    def _open_cfg(cls, filename: str) -> TextIO:
        try:
            with open(PathManager.get_local_path(filename), encoding="utf-8") as file:
                return io.StringIO(file.read())
        except UnicodeDecodeError:
            raise InputError(f"{filename} is not a text file") from None
        except OSError as error:
            raise InputError(f"{filename}: {error.strerror or error}") from None


def _refusal(filename: str, error: yaml.YAMLError) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{filename}:{mark.line + 1}" if mark else filename
    problem = " ".join((getattr(error, "problem", None) or str(error)).split())
    found = re.search(r"determine a constructor for the tag '(.*)'", problem)
    if found:
        tag = found[1].replace("tag:yaml.org,2002:", "!!")
        return InputError(
            f"{where}: the tag {tag!r} is refused, because a tag can run code; write the value "
            "itself"
        )
    return InputError(f"{where} is not yaml: {problem}")


def _check_names(section: dict[Any, Any], path: str) -> None:
    for key, value in section.items():
        if not isinstance(key, str):
            raise InputError(f"{path}: {key!r} is no key; keys are names, such as MODEL")
        if isinstance(value, dict):
            _check_names(value, path)


@cache
def _detectron2_folders() -> tuple[str, ...]:
    # In an editable installation Detectron2 links its configs to a folder beside the package.
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in (ZOO.parents[1], ZOO))


# A folder of detectron2.projects: what adds its keys, and the words of a yaml that need them.
_PROJECTS = {
    "point_rend": (
        "add_pointrend_config",
        {"POINT_HEAD", "PointRendMaskHead", "ImplicitPointRendMaskHead", "CoarseMaskHead"},
    ),
    "panoptic_deeplab": (
        "add_panoptic_deeplab_config",
        {"PanopticDeepLab", "PANOPTIC_DEEPLAB", "INS_EMBED_HEAD"},
    ),
    "deeplab": (
        "add_deeplab_config",
        {"DeepLabV3Head", "DeepLabV3PlusHead", "ASPP_CHANNELS", "ASPP_DILATIONS"},
    ),
}


def add_project_config(cfg: CfgNode, yaml: dict[str, Any], path: str) -> None:
    """Adds the keys of Detectron2's projects to a config where the yaml that comes next needs them.

    Only there: other configs stay what `get_cfg` and `add_rope_vit_config` can load again. Keys
    that are there keep their values. The import registers the project's heads.

    Args:
        cfg: changed in place.
        yaml: what comes next.
        path: of the yaml, for messages.

    Raises:
        InputError: the yaml needs a project, and this Detectron2 comes without it, or without a
            package that it needs.
    """
    words = set(re.findall(r"\w+", str(yaml.get("MODEL"))))
    for name, (add, needed_by) in _PROJECTS.items():
        if words.isdisjoint(needed_by):
            continue
        try:
            project = importlib.import_module(f"detectron2.projects.{name}")
        except ImportError as error:
            raise InputError(
                f"{path} needs detectron2.projects.{name}, which cannot be imported ({error}); "
                "tools/install_detectron2.py installs a Detectron2 that has it, and panopticapi "
                "comes from its repository, github.com/cocodataset/panopticapi"
            ) from None
        before = cfg.clone()  # whose values stay, also where the project sets the same keys
        getattr(project, add)(cfg)
        cfg.merge_from_other_cfg(before)

"""Reading yaml configs of others without running what is in them.

Detectron2's `merge_from_file` lets a yaml call any Python function by a tag. Its own RetinaNet
needs one, so tags are honoured in the files that Detectron2 installs, and nowhere else.
"""

import importlib
import io
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, TextIO

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

from ..errors import InputError

# Whatever else a tag names, PyYAML's own safe loader could not construct it either.
_PLAIN_TAGS = frozenset(yaml.SafeLoader.yaml_constructors) - {None}


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
        loaded = _CheckedFiles.load_yaml_with_base(path, allow_unsafe=True)
    except RecursionError:
        raise InputError(f"{path}: _BASE_ leads back to itself, or nests too deeply") from None
    except yaml.YAMLError as error:  # a list as a key, and the like
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    _check_names(loaded, path)
    # Detectron2 guesses the version where there is none, and says so on every run.
    if type(loaded.setdefault("VERSION", cfg.VERSION)) is not int:
        raise InputError(f"{path}: VERSION is {loaded['VERSION']!r}; allowed: {cfg.VERSION}")
    add_project_config(cfg, loaded, path)
    # An attribute of this object goes before the method of its class, which stays as it is; all
    # the rest (versions, types) is Detectron2's. No key can clash: yacs keeps attributes apart from
    # the entries.
    cfg.__dict__["load_yaml_with_base"] = lambda *args, **kwargs: loaded
    try:
        cfg.merge_from_file(path)
    finally:
        del cfg.__dict__["load_yaml_with_base"]


class _CheckedFiles(CfgNode):
    """Lends Detectron2's loader files whose content has been looked at."""

    @classmethod
    def _open_cfg(cls, filename: str) -> TextIO:
        # Every time a file is opened its text is read once, and it is this text that is checked
        # and then parsed. Links are followed first: what counts is where a file really lies.
        try:
            path = os.path.realpath(PathManager.get_local_path(filename))
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError:
            raise InputError(f"{filename} is not a text file") from None
        except OSError as error:
            raise InputError(f"{filename}: {error.strerror or error}") from None
        _check(text, filename, tags_allowed=_belongs_to_detectron2(path))
        return io.StringIO(text)


def _check(text: str, filename: str, *, tags_allowed: bool) -> None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{filename}:{mark.line + 1}" if mark else filename
        raise InputError(f"{where} is not yaml: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{filename} is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{filename} is not a config: it should hold lines of KEY: VALUE")
    for key, value in root.value:
        bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.value == BASE_KEY and not all(isinstance(b, yaml.ScalarNode) for b in bases):
            raise InputError(f"{filename}:{key.start_mark.line + 1}: _BASE_ is no path, nor a list")
    tagged = [node for node in _walk(root) if node.tag not in _PLAIN_TAGS]
    if tagged and not tags_allowed:
        first = min(tagged, key=lambda node: node.start_mark.line)
        raise InputError(
            f"{filename}:{first.start_mark.line + 1}: the tag {_short(first.tag)} is refused, "
            "because a tag can run code; write the value itself"
        )


def _check_names(section: dict[Any, Any], path: str) -> None:
    for key, value in section.items():
        if not isinstance(key, str):
            raise InputError(f"{path}: {key!r} is no key; keys are names, such as MODEL")
        if isinstance(value, dict):
            _check_names(value, path)


def _walk(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once: an alias is the node it stands for, which may even hold itself."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _short(tag: str) -> str:
    prefix = "tag:yaml.org,2002:"
    return repr("!!" + tag.removeprefix(prefix) if tag.startswith(prefix) else tag)


@cache
def _detectron2_folders() -> tuple[str, ...]:
    package = os.path.dirname(detectron2.__file__)
    # In an editable installation Detectron2 links this folder to one beside the package.
    configs = os.path.join(package, "model_zoo", "configs")
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in (package, configs))


def _belongs_to_detectron2(path: str) -> bool:
    return path.startswith(_detectron2_folders())


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
    words = set(_words(yaml.get("MODEL")))
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
        with_project = get_cfg()
        getattr(project, add)(with_project)
        _add_missing(cfg, with_project)


def _words(section: Any) -> Iterator[str]:
    """The keys of a section and those within, and the values that are text."""
    if isinstance(section, str):
        yield section
    elif isinstance(section, dict):
        for key, value in section.items():
            yield key
            yield from _words(value)


def _add_missing(cfg: CfgNode, other: CfgNode) -> None:
    for key, value in other.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            _add_missing(cfg[key], value)

"""Merging into a config, with errors that name file, key and remedy in one line."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode

from ..errors import InputError, did_you_mean

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
        return f"there is no key {key}{did_you_mean(key, _keys(cfg))}"
    if mismatch:
        wanted, given = (mismatch[kind].rpartition(".")[2] for kind in ("wanted", "given"))
        key = mismatch["key"]
        if wanted == "CfgNode":
            return f"{key} is a section: set the keys in it, not the whole"
        value = " ".join(mismatch["values"].rpartition(" vs. ")[2].split())
        return f"{key} takes a {wanted}, and {value!r} is a {given}"
    return " ".join(reason.split())


def _keys(cfg: CfgNode, path: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield path + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{path}{key}.")

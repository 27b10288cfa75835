"""What a value may be: an argument, a key of a config, a number in a JSON file."""

import math
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

_MAX = 2**63


def is_whole_number(value: Any, least: int = 0) -> bool:
    """False for True and False, and for 16.0."""
    return type(value) is int and value >= least


def is_number(value: Any) -> bool:
    """Not True, False, NaN or infinite, nor beyond 2^63, as 10^400 in a JSON file is."""
    return type(value) in (int, float) and -_MAX < value < _MAX


def is_pair(value: Any) -> bool:
    """Two whole numbers of 1 or more, as (h, w)."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(is_whole_number(side, 1) for side in value)
    )


def to_pair(value: Any) -> Any:
    """A side as (h, w), a pair as a tuple; what is neither, as it is."""
    return (value, value) if is_whole_number(value) else tuple(value) if is_pair(value) else value


def are_blocks(value: Any, depth: int) -> bool:
    """Indices of blocks, in any order."""
    is_list = isinstance(value, Sequence | Set) and not isinstance(value, str)
    return is_list and all(is_whole_number(block) and block < depth for block in value)


class ArgumentError(ValueError):
    """An argument has a value that is not allowed; whoever filled it from a key names the key."""

    def __init__(self, name: str, value: Any, allowed: str) -> None:
        super().__init__(f"{name} must be {allowed}, got {value!r}")
        self.name, self.allowed = name, allowed


def check_argument(name: str, value: Any, ok: bool, allowed: str) -> None:
    """
    Raises:
        ArgumentError: names the argument, what is allowed and what was given.
    """
    if not ok:
        raise ArgumentError(name, value, allowed)


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def is_id(value: Any) -> bool:
    return type(value) is int and is_number(value)


class Rule(NamedTuple):
    """What a key may be, and how a message says so."""

    holds: Callable[[Any], bool]
    allowed: str


FLAG = Rule(lambda value: type(value) is bool, "True or False")


def whole(least: int, meaning: str = "") -> Rule:
    text = f"a whole number of {least} or more"
    return Rule(lambda value: is_whole_number(value, least), text + meaning)


def number(
    least: float, most: float = math.inf, *, or_least: bool = True, or_most: bool = True
) -> Rule:
    """A number from `least`, or above it, to `most`, or below it."""
    text = f"{least} or more" if or_least else f"above {least}"
    text += "" if most == math.inf else f", {'up to' if or_most else 'below'} {most}"
    ends = [least] * or_least + [most] * or_most
    return Rule(lambda x: is_number(x) and (least < x < most or x in ends), text)


def several(rule: Rule, least: int = 1, most: float = math.inf) -> Rule:
    """A list of values that follow a rule each."""
    wanted = f"a list of {least}" if least == most else f"a list of {least} or more"
    return Rule(
        lambda value: (
            isinstance(value, list | tuple)
            and least <= len(value) <= most
            and all(map(rule.holds, value))
        ),
        f"{wanted}, each: {rule.allowed}",
    )


def optional(rule: Rule, meaning: str) -> Rule:
    """None, which has a meaning, or what a rule allows."""
    text = f"None ({meaning}), or {rule.allowed}"
    return Rule(lambda value: value is None or rule.holds(value), text)


def one_of(values: Sequence[str]) -> Rule:
    return Rule(lambda value: value in values, " or ".join(map(repr, values)))


def check_rule(name: str, value: Any, rule: Rule) -> None:
    """
    Raises:
        ArgumentError: see :func:`check_argument`.
    """
    check_argument(name, value, rule.holds(value), rule.allowed)

"""What counts as a number in a JSON file, where true, NaN and 10^400 are no surprise."""

from typing import Any

_MOST = 2**63


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MOST < value < _MOST


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def is_id(value: Any) -> bool:
    return type(value) is int and is_number(value)

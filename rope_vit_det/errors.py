"""What the user gave is wrong, and this is what to do: the exception that says so, in one line."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """A wrong config value, file or combination of them.

    The message is a single line that names the key, file or value and says what to do about it.
    """


@contextmanager
def input_errors_as_one_line() -> Iterator[None]:
    """For command-line tools: prints an :class:`InputError` without a traceback, exits with 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; "" where no known one is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""The one exception that means: something the user gave is wrong, and this is what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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

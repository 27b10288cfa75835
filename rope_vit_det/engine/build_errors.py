"""The last resort for settings that no check knows: what Detectron2 says, as one line."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import detectron2

from ..errors import InputError

_DETECTRON2 = os.path.join(os.path.dirname(detectron2.__file__), "")


@contextmanager
def build_errors_as_input_errors() -> Iterator[None]:
    """For building from a config: what Detectron2's own code refuses is an :class:`InputError`.

    Errors of other code, such as heads of the user's own, keep their traceback.
    """
    try:
        yield
    except InputError:
        raise
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if not where.filename.startswith(_DETECTRON2):
            raise
        place = f"detectron2/{where.filename.removeprefix(_DETECTRON2)}, line {where.lineno}"
        kind, reason = type(error).__name__, " ".join(str(error).split())
        raise InputError(
            f"Detectron2 cannot build this config: {kind} {reason} at {place}: {where.line}"
        ) from error

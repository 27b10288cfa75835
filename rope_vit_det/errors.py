"""What ends a program with one clear line instead of a traceback, and the exit statuses."""

import difflib
import importlib.util
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement


class InputError(ValueError):
    """A wrong config value, file or combination of them.

    The message is a single line that names the key, file or value and says what to do about it.
    """

    status = 2


class RunError(RuntimeError):
    """The end of a run that began well, in a single line that says how to go on."""

    status = 1


class DivergedError(RunError):
    """A loss is not finite."""

    status = 3


class DiskFullError(RunError):
    """A file of the run, such as a checkpoint, cannot be written."""

    status = 4


class StoppedError(RunError):
    """A signal ended the run, which wrote a checkpoint; to be run again with --resume."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again


def print_any_text() -> None:
    """Escapes what stdout or stderr cannot encode, such as a class name, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        encoding, errors = (getattr(stream, name, "") for name in ("encoding", "errors"))
        if errors == "strict" or not str(encoding).lower().startswith("utf"):
            with suppress(AttributeError, ValueError):  # in its place is another, or it is closed
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextmanager
def input_errors_as_one_line() -> Iterator[None]:
    """For command-line tools: prints these errors without a traceback, exits with their status.

    Detectron2 calls torch.jit.script when it is imported, of which torch 2.15 warns whoever started
    the tool; not here, nor in the processes that it starts.
    """
    print_any_text()
    sys.warnoptions.append("ignore:`torch.jit.script` is deprecated:FutureWarning")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    try:
        yield
    except (InputError, RunError) as error:
        kind = "stopped" if isinstance(error, StoppedError) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(error.status)


def check_packages(*names: str, extra: str) -> None:
    """
    Raises:
        InputError: one is missing, or older than this package's own metadata asks for.
    """
    wanted = [name for name in names if importlib.util.find_spec(name) is None]
    with suppress(metadata.PackageNotFoundError):  # ours is not installed, or theirs has a variant
        for requirement in map(Requirement, metadata.requires("rope-vit-det") or ()):
            if requirement.name in names and requirement.name not in wanted:
                found = metadata.version(requirement.name)
                if not requirement.specifier.contains(found, prereleases=True):
                    wanted.append(f"{requirement.name}{requirement.specifier} (here: {found})")
    if wanted:
        raise InputError(
            f"this needs {', '.join(wanted)}: pip install 'rope-vit-det[{extra}]', or these alone"
        )


def some_of(values: Sequence[Any], most: int = 3) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; "" where no known one is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

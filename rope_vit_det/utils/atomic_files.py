"""Files that appear whole or not at all."""

import filecmp
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """For writing a file whole or not at all: gives a temporary path, which is renamed at the end.

    Args:
        force: replace a file that is there.

    Raises:
        InputError: the file is there and not to be replaced, or cannot be written.
    """
    path = Path(os.path.realpath(path))  # through a link, to the file it stands for
    check_new_file(path, force=force)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # Another process may have written the same at the same time.
        same = not force and path.is_file() and filecmp.cmp(temporary, path, shallow=False)
        check_new_file(path, force=force or same)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """For writing a folder whole or not at all: gives a temporary one, which is moved at the end.

    Raises:
        InputError: as :func:`check_new_folder`, or it cannot be written.
    """
    path = Path(os.path.abspath(path))
    check_new_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            folder = Path(temporary, path.name)
            folder.mkdir()
            yield folder
            folder.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def check_new_file(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Finds out, before the work, whether a file can be put at a path.

    Raises:
        InputError: there is a folder, or a file that is not to be replaced; or as
            :func:`check_folder` of its folder.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder")
    if os.path.exists(path) and not force:
        raise InputError(f"{path} is there already; give another name, or --force to replace it")
    check_folder(Path(os.path.realpath(path)).parent)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Finds out, before the work, whether a folder can be made.

    Raises:
        InputError: it is there, or as :func:`check_folder` of the one that it is to be in.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} is there already; name a new folder")
    check_folder(Path(os.path.abspath(path)).parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Finds out, before the work, whether files can be put into a folder, there or to be made.

    Raises:
        InputError: they cannot; says why.
    """
    folder = Path(os.path.abspath(path))
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not there.is_dir():
        raise InputError(f"{path} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written: {there} is read-only")


def _flush_folder(folder: Path) -> None:
    """Puts the names of the files onto the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Image files: which ones a command line means, and reading them ahead of the network."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import InputError

READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing run outside Python's lock
_BATCHES_AHEAD = 2
_T = TypeVar("_T")


def find_images(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Image files, in the order of the inputs, those of a folder or a pattern sorted; each once.

    Args:
        inputs: image files (of whatever name), folders (searched through, for files with the
            suffix of an image) and patterns (`**` for any depth; folders that match are searched).

    Raises:
        InputError: there are none; an input does not exist, or brings no image.
    """
    if not inputs:
        raise InputError("no images given: name image files, folders or patterns")
    found: dict[str, str] = {}
    for given in map(os.fspath, inputs):
        images = list(_images(given))
        if not images:
            raise InputError(
                f"{given} brings no image (suffixes looked for: {', '.join(IMG_EXTENSIONS)})"
            )
        for image in images:
            found.setdefault(os.path.abspath(image), image)
    return list(found.values())


def load_batches(
    paths: Sequence[str], batch_size: int, load: Callable[[str], _T]
) -> Iterator[list[tuple[str, _T]]]:
    """Pairs of path and what `load` makes of it, a few batches ahead of whoever takes them."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque = deque()
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            ahead.append([(path, pool.submit(load, path)) for path in chunk])
            if len(ahead) > _BATCHES_AHEAD:
                yield [(path, future.result()) for path, future in ahead.popleft()]
        while ahead:
            yield [(path, future.result()) for path, future in ahead.popleft()]


def check_depth(image: Image.Image) -> None:
    """Refuses an image whose conversion to RGB would cut its values off.

    Raises:
        ValueError: its channels have more than 8 bits.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")


def describe_read_error(path: str, error: Exception) -> str:
    """Why a file could not be read, in one line that does not name it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).replace(repr(path), "the file").split()) or type(error).__name__


def _images(given: str) -> Iterator[str]:
    if os.path.isdir(given):
        yield from _in_folder(given)
    elif os.path.lexists(given):
        yield given
    elif glob.has_magic(given):
        for match in sorted(glob.glob(given, recursive=True)):
            if os.path.isdir(match):
                yield from _in_folder(match)
            elif _is_image(match):
                yield match
    else:
        raise InputError(f"{given}: no such file or folder")


def _in_folder(folder: str) -> Iterator[str]:
    """Through linked folders too, but none twice: a link may lead back up."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        new = {os.path.realpath(os.path.join(parent, name)): name for name in sorted(folders)}
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
        yield from (os.path.join(parent, name) for name in sorted(files) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)

"""Image files: which ones a command line means, reading them, and whether that can be done."""

import glob
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, TypeVar
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from ..errors import InputError

READERS = min(8, os.cpu_count() or 1)  # threads: decoding and resizing run outside Python's lock
_BATCHES_AHEAD = 2
_T = TypeVar("_T")


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
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
    for given in inputs:
        images = list(_images(os.fspath(given)))
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
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).replace(repr(path), "the file").split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        text += " Larger images are taken in pieces: predict.py --slice, slice_coco.py, TEST.SLICE"
    return text


def _images(given: str) -> Iterator[str]:
    is_there = os.path.lexists(given)
    if not is_there and not glob.has_magic(given):
        raise InputError(f"{given}: no such file or folder")
    for match in [given] if is_there else sorted(glob.glob(given, recursive=True)):
        if os.path.isdir(match):
            yield from filter(_is_image, files_in(match))
        elif is_there or _is_image(match):
            yield match


def files_in(folder: str) -> Iterator[str]:
    """Paths of the files in and below a folder, sorted in each.

    Through linked folders too, but none twice: a link may lead back up.
    """
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        new = {os.path.realpath(os.path.join(parent, name)): name for name in sorted(folders)}
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
        yield from (os.path.join(parent, name) for name in sorted(files))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


ORIENTATION = 274  # EXIF's tag
_TURNED = range(2, 9)
SIDEWAYS = (5, 6, 7, 8)
# How a whole file ends, by PIL's name of its format.
_JPEGS: dict[str, bytes | None] = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_ENDS = _JPEGS | {"PNG": b"\0\0\0\0IEND\xaeB`\x82"}
_STRIP = 2**24  # pixels that PIL hands over at a time
_THREADS = 16  # most of the time they wait for the disk
_BAR: dict[str, Any] = {"unit": " files", "delay": 3, "leave": False}  # a bar after 3 seconds

_R = TypeVar("_R")


def any_number_of_pixels(really: bool) -> AbstractContextManager:
    """Without Pillow's limit, for whoever cuts a large image into pieces; puts it back."""
    return patch.object(Image, "MAX_IMAGE_PIXELS", None) if really else nullcontext()


def to_rgb(image: Image.Image, *, turned: bool) -> Image.Image:
    """An image in RGB: itself where it is.

    Args:
        turned: as its EXIF data say.

    Raises:
        ValueError: its channels have more than 8 bits, which PIL would cut off.
        OSError, and others of PIL: its file is damaged.
    """
    check_depth(image)
    if turned and image.getexif().get(ORIENTATION) in _TURNED:
        image = ImageOps.exif_transpose(image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def open_rgb(path: str | os.PathLike | BinaryIO, *, turned: bool = False) -> Image.Image:
    """An image file as RGB; arguments and errors as of :func:`to_rgb`."""
    with Image.open(path) as image:
        return to_rgb(image, turned=turned)


def read_rgb(image: str | os.PathLike | BinaryIO | Image.Image, name: str = "") -> np.ndarray:
    """An image as RGB, (H, W, 3) uint8, turned as its EXIF data say: as in the training.

    Args:
        image: a path, a file that is open for reading bytes, or PIL's image.
        name: for the message; "": the path.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if isinstance(image, Image.Image):
            rgb = to_rgb(image, turned=True)
        else:
            rgb = open_rgb(image, turned=True)
        # At once, PIL would hold the pixels three times more.
        pixels = np.empty((rgb.height, rgb.width, 3), np.uint8)
        rows = max(1, _STRIP // max(1, rgb.width))
        for top in range(0, rgb.height, rows):
            box = (0, top, rgb.width, min(top + rows, rgb.height))
            pixels[top : top + rows] = np.asarray(rgb.crop(box))
        return pixels
    except Exception as error:  # PIL's plugins raise whatever a damaged file leads them to
        what = name or str(image)
        raise InputError(f"{what}: {describe_read_error(what, error)}") from None


def image_size(
    path: str | os.PathLike[str], *, decode: bool = False, ends: bool = False
) -> tuple[int, int]:
    """(width, height) in pixels as Detectron2 reads an image: turned as its EXIF data say.

    A JPEG file is decoded only where its last bytes are not those of a whole one; other formats
    always are.

    Args:
        decode: a JPEG file too.
        ends: a PNG file is treated as a JPEG is, and what has no known end is not decoded: for who
            will decode it anyhow. A PNG may then be taken for one that is not turned.

    Raises:
        InputError: the reason why it cannot be read, without the path.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            check_depth(image)
            width, height = image.size
            # A PNG's own would decode it, as its EXIF data may lie behind the pixels.
            exif = Image.Image.getexif(image) if ends else image.getexif()
            orientation = exif.get(ORIENTATION)
            if image.format == "TIFF" and orientation in _TURNED and not ends:
                raise ValueError("its EXIF data turn it, and Detectron2 would turn a TIFF twice")
            if orientation in SIDEWAYS:
                width, height = height, width
            end = (_ENDS if ends else _JPEGS).get(image.format or "", b"" if ends else None)
            if decode or end is None or not _ends_with(file, end):
                image.load()
    except Exception as error:
        raise InputError(describe_read_error(str(path), error)) from None
    return width, height


def for_each_file(function: Callable[[_T], _R], items: Sequence[_T], what: str) -> list[_R]:
    """The results of a function that waits for the disk, in order, under a progress bar.

    Args:
        what: is being done, for the bar.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's about big images and odd metadata
        return thread_map(function, items, tqdm_class=tqdm, max_workers=_THREADS, desc=what, **_BAR)


def _ends_with(file: BinaryIO, end: bytes) -> bool:
    file.seek(-len(end), os.SEEK_END)
    return file.read() == end

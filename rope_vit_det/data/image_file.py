"""Image files: reading them as the training does, and finding out whether that can be done."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError
from ..images import check_depth, describe_read_error

_ORIENTATION = 274  # EXIF's tag
_SIDEWAYS = (5, 6, 7, 8)
_JPEGS = ("JPEG", "MPO")
_END_OF_JPEG = b"\xff\xd9"
_THREADS = 16  # most of the time they wait for the disk
_DELAY = 3  # seconds without a progress bar

_T = TypeVar("_T")
_R = TypeVar("_R")


def read_rgb(path: str) -> np.ndarray:
    """An image file as RGB, (H, W, 3) uint8, turned as its EXIF data say: as in the training.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            check_depth(image)
        return read_image(path, "RGB")
    except Exception as error:  # PIL's plugins raise whatever a damaged file leads them to
        raise InputError(f"{path}: {describe_read_error(path, error)}") from None


def image_size(path: str | os.PathLike, *, decode: bool = False) -> tuple[int, int]:
    """(width, height) in pixels as Detectron2 reads an image: turned as its EXIF data say.

    A JPEG file is decoded only where its last bytes are not those of a whole one; other formats
    always are.

    Args:
        decode: a JPEG file too.

    Raises:
        InputError: the reason why it cannot be read, without the path.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            check_depth(image)
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
            if decode or image.format not in _JPEGS or not _is_whole_jpeg(file):
                image.load()
    except UnidentifiedImageError:
        raise InputError("no image") from None
    except Exception as error:
        raise InputError(describe_read_error(str(path), error)) from None
    return width, height


def for_each_file(function: Callable[[_T], _R], items: Sequence[_T], what: str) -> Iterator[_R]:
    """The results of a function that waits for the disk, in order, under a progress bar.

    Args:
        what: is being done, for the bar.
    """
    bar = tqdm(total=len(items), desc=what, unit=" files", delay=_DELAY, leave=False)
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # of Pillow's about big images and odd metadata
        for result in pool.map(function, items):
            bar.update()
            yield result


def _is_whole_jpeg(file: BinaryIO) -> bool:
    file.seek(-len(_END_OF_JPEG), os.SEEK_END)
    return file.read() == _END_OF_JPEG

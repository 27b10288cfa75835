"""Image files: whether they can be read, and as what."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError

_ORIENTATION = 274  # EXIF's tag
_SIDEWAYS = (5, 6, 7, 8)
# Of more than 8 bits in one channel: Pillow's conversion to RGB cuts them off at 255.
_DEEP_MODES = ("I", "F")
_END_OF_JPEG = b"\xff\xd9"
_JPEGS = ("JPEG", "MPO")
_THREADS = 16
# Seconds without a progress bar.
_DELAY = 3

_T = TypeVar("_T")
_R = TypeVar("_R")


def image_size(path: str | PathLike, *, decode: bool = False) -> tuple[int, int]:
    """(width, height) in pixels as Detectron2 reads an image: turned as its EXIF data say.

    A JPEG file is decoded only where its last bytes are not those of a whole one; other formats
    always are.

    Args:
        decode: a JPEG file too.

    Raises:
        InputError: the reason why it cannot be read, without the path.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of Pillow's about big images and odd metadata
            with Image.open(file) as image:
                width, height = image.size
                if image.mode.startswith(_DEEP_MODES):
                    raise InputError(
                        f"{image.mode} pixels, which reading as RGB would cut off at 255; "
                        "save it with 8 bits"
                    )
                if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                    width, height = height, width
                if decode or image.format not in _JPEGS or not _is_whole_jpeg(file):
                    image.load()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("no image") from None
    except Exception as error:  # Pillow's decoders raise all kinds
        raise InputError(" ".join(str(error).split()) or type(error).__name__) from None
    return width, height


def for_each_file(function: Callable[[_T], _R], items: Sequence[_T], what: str) -> Iterable[_R]:
    """The results of a function that waits for the disk, in order, under a progress bar.

    Args:
        what: is being done, for the bar.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        bar = tqdm(total=len(items), desc=what, unit="files", delay=_DELAY, leave=False)
        with bar:
            for result in pool.map(function, items):
                bar.update()
                yield result


def _is_whole_jpeg(file: BinaryIO) -> bool:
    file.seek(-len(_END_OF_JPEG), 2)
    return file.read() == _END_OF_JPEG

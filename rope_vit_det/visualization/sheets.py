"""Pictures in a folder, and on one sheet. All are RGB, (H, W, 3) uint8."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError
from ..utils.atomic_files import new_file

_CAPTION_HEIGHT = 44
_GAP = 8
_READABLE_SIDE = 640  # pixels


def check_no_other_run(folder: str | os.PathLike, names: Collection[str]) -> None:
    """Before numbered pictures (000_NAME.png) are written into a folder.

    Args:
        names: theirs.

    Raises:
        InputError: pictures of an earlier run would stay among them.
    """
    for path in sorted(Path(folder).glob("*.png")):
        if re.match(r"\d{3,}_", path.name) and path.name not in names:
            raise InputError(
                f"{folder} holds pictures of an earlier run ({path.name}), which would stay among "
                "the new ones; remove them, or name another folder"
            )


def write_picture(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes a PNG, or a JPEG where the path ends in .jpg, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    kind = "JPEG" if os.fspath(path).lower().endswith((".jpg", ".jpeg")) else "PNG"
    with new_file(path, force=True) as temporary:
        Image.fromarray(picture).save(temporary, format=kind)


def make_sheet(
    pictures: Sequence[np.ndarray], columns: int, width: int, captions: Sequence[str] = ()
) -> np.ndarray:
    """Pictures in rows on white.

    Args:
        pictures: none wider than `width`.
        width: of a column, in pixels.
        captions: over the columns.
    """
    columns = min(columns, len(pictures))
    step = width + 2 * _GAP
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(len(picture) for picture in row) for row in rows]
    top = _CAPTION_HEIGHT if captions else 0
    sheet = Image.new("RGB", (columns * step, top + sum(heights) + _GAP * len(rows)), "white")
    font = ImageFont.load_default(26)
    for i, text in enumerate(captions[:columns]):
        middle = (i * step + step // 2, top // 2)
        ImageDraw.Draw(sheet).text(middle, text, fill="black", font=font, anchor="mm")
    for row, height in zip(rows, heights, strict=True):
        for i, picture in enumerate(map(Image.fromarray, row)):
            left, above = (step - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (i * step + left, top + above))
        top += height + _GAP
    return np.array(sheet)


def fit_scale(image: np.ndarray, panel: tuple[int, int]) -> float:
    """The factor by which an image just fits into a panel of (width, height)."""
    return min(panel[0] / image.shape[1], panel[1] / image.shape[0])


def readable_scale(image: np.ndarray) -> float:
    """The factor by which to enlarge an image so that labels do not hide it; 1 for most."""
    return max(1.0, _READABLE_SIDE / max(image.shape[:2]))


def caption_below(
    picture: np.ndarray, text: str, counts: Sequence[tuple[str, tuple[int, int, int]]]
) -> np.ndarray:
    """The picture with a white strip below it, on which stand coloured words and a text.

    Args:
        counts: words and their RGB colours, which come first.
    """
    height, width = picture.shape[:2]
    size = max(16, width // 40)
    canvas = Image.new("RGB", (width, height + 2 * size), "white")
    canvas.paste(Image.fromarray(picture))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    x, y = size // 2, height + size // 3
    for word, colour in (*counts, (text, (0, 0, 0))):
        draw.text((x, y), word, fill=colour, font=font)
        x += int(draw.textlength(word, font=font)) + size
    return np.array(canvas)

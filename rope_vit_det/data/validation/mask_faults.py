"""COCO's masks, polygons or RLE, looked at before pycocotools' C code trusts them."""

from collections.abc import Iterator

from ...utils.arguments import is_number
from ..coco_file import is_polygon
from .faults import Fault

# Characters of a compressed count that fit into pycocotools' 32 bits.
_LONGEST_COUNT = 7


def inspect_mask(
    annotation: dict, image: dict, where: str, mask_format: str | None
) -> Iterator[Fault]:
    """The faults of an annotation's "segmentation".

    Args:
        image: its entry, with "width" and "height".
        where: names the annotation.
        mask_format: INPUT.MASK_FORMAT where masks are learned.
    """
    mask, crowd = annotation.get("segmentation"), annotation.get("iscrowd")
    if not mask:
        if mask_format and not crowd:
            yield Fault("no mask", where)
    elif isinstance(mask, dict):
        problem = _rle_problem(mask, image)
        if problem:
            yield Fault("malformed", where, problem)
        elif mask_format == "polygon" and not crowd:
            yield Fault("RLE mask", where)
    elif not isinstance(mask, list) or not all(isinstance(part, list) for part in mask):
        yield Fault("malformed", where, "segmentation is neither polygons nor RLE")
    elif not all(is_number(value) for part in mask for value in part):
        yield Fault("malformed", where, "a polygon has values that are no numbers")
    elif any(_is_far(part, image) for part in mask):
        yield Fault("malformed", where, "a polygon lies far outside the image")
    else:
        good = [is_polygon(part) for part in mask]
        if not any(good):
            yield Fault("bad polygon", where)
        elif not all(good):
            yield Fault("bad part", where, f"number {good.index(False) + 1} of {len(good)}")


def _is_far(polygon: list[float], image: dict) -> bool:
    """Whether it reaches more than the image's size beyond it: rasterizing takes memory by that."""
    return any(
        not -side <= value <= 2 * side
        for values, side in ((polygon[::2], image["width"]), (polygon[1::2], image["height"]))
        for value in values
    )


def _rle_problem(mask: dict, image: dict) -> str | None:
    if not {"counts", "size"} <= mask.keys():
        return "RLE without 'counts' and 'size'"
    if mask["size"] != [image["height"], image["width"]]:
        return f"RLE of size {mask['size']}"
    counts = mask["counts"]
    try:
        counts = _decompressed(counts) if isinstance(counts, str) else counts
    except (ValueError, IndexError):
        return "RLE whose counts are damaged"
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return "RLE whose counts are not whole numbers of 0 or more"
    pixels = image["height"] * image["width"]
    if sum(counts) != pixels:
        return f"RLE of {sum(counts)} pixels, in an image of {pixels}"
    return None


def _decompressed(text: str) -> list[int]:
    """Run lengths from COCO's string: 5 bits a character, then differences to the last but one."""
    counts: list[int] = []
    start = 0
    while start < len(text):
        end = start
        while (ord(text[end]) - 48) & 32:
            end += 1
        digits = [ord(letter) - 48 for letter in text[start : end + 1]]
        if len(digits) > _LONGEST_COUNT or not all(0 <= digit < 64 for digit in digits):
            raise ValueError(text[start : end + 1])
        count = sum((digit & 31) << 5 * i for i, digit in enumerate(digits))
        if digits[-1] & 16:
            count -= 1 << 5 * len(digits)
        counts.append(count + (counts[-2] if len(counts) > 2 else 0))
        start = end + 1
    return counts

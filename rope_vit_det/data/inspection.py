"""Reads COCO annotations with suspicion: every fault with the file and id that it belongs to."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

_EXAMPLES = 3
# Pixels by which annotation tools round a box beyond the image.
_TOLERANCE = 1.0

# What each kind of fault is, of one and of several, and whether Detectron2 could train with it.
_FATAL = {
    "malformed": "malformed entries",
    "no image": "images that the folder lacks",
    "unreadable image": "images that cannot be read",
    "other size": "images of another size than the JSON says",
    "duplicate id": "duplicate ids",
    "unknown category": "annotations of a category that the JSON lacks",
    "ignored": 'annotations with "ignore", which Detectron2 does not know (use "iscrowd")',
    "no mask": "annotations without a mask (set MODEL.MASK_ON False to train boxes only)",
    "RLE mask": "masks as RLE (set INPUT.MASK_FORMAT bitmask)",
    "no annotations": "no annotations at all",
}
_OTHERS = {
    "unknown image": "annotations of an image that the JSON lacks (not used)",
    "zero area": "objects of zero area (not learned from)",
    "outside": "boxes wholly outside their image (not learned from)",
    "partly outside": "boxes partly outside their image (cut off at its edge)",
    "bad polygon": "masks without a polygon of three points (not used)",
    "same file": "image entries that name a file again",
    "same name": "categories that bear another one's name",
    "empty category": "categories without an annotation",
}


@dataclass(frozen=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        kind: a short name of what is wrong.
        where: the image file and the id of the entry.
        detail: what was found there.
    """

    kind: str
    where: str
    detail: str = ""

    @property
    def is_fatal(self) -> bool:
        """Whether training or evaluation would end in an error, or in nonsense."""
        return self.kind in _FATAL

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Inspection:
    """What is in a dataset, and what is wrong with it."""

    json_file: str
    images: int
    unannotated: int
    objects: int
    categories: int
    faults: list[Fault]

    @property
    def fatal(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.is_fatal]

    def describe(self) -> str:
        """A line on what is there, and one for each kind of fault, with examples."""
        lines = [
            f"{self.json_file}: {self.images} images ({self.unannotated} without annotations), "
            f"{self.objects} annotations, {self.categories} categories"
        ]
        return "\n  ".join(lines + list(self.describe_faults(self.faults)))

    def describe_faults(self, faults: list[Fault]) -> Iterator[str]:
        """How many of each kind, and the first few of them."""
        texts = _FATAL | _OTHERS
        for kind, count in Counter(fault.kind for fault in faults).items():
            some = [fault for fault in faults if fault.kind == kind]
            of = f" of {self.images}" if kind == "no image" else ""
            examples = ", ".join(
                fault.where + (f" ({fault.detail})" if fault.detail else "")
                for fault in some[:_EXAMPLES]
            )
            more = ", …" if count > _EXAMPLES else ""
            yield f"{count}{of} {texts[kind]}: {examples}{more}"


def inspect_coco(
    coco: dict[str, Any],
    json_file: str,
    image_root: str | PathLike,
    *,
    mask_format: str | None = None,
    open_images: bool = False,
) -> Inspection:
    """Looks at every image entry, annotation and category.

    Args:
        coco: the parsed JSON, with the lists "images", "categories" and, unless nothing is
            annotated, "annotations".
        json_file: where it comes from, for the messages.
        image_root: folder of the images.
        mask_format: INPUT.MASK_FORMAT where masks are learned.
        open_images: compare the sizes of the image files with those in the JSON.
    """
    images, faults = _inspect_images(coco["images"])
    categories = _inspect_categories(coco["categories"], faults)
    faults += _find_missing(images.values(), Path(image_root))
    missing = {fault.where for fault in faults if fault.kind == "no image"}
    if open_images:
        there = [image for image in images.values() if _where(image) not in missing]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda image: _inspect_file(image, Path(image_root)), there)
            faults += [fault for fault in found if fault]
    annotations = coco.get("annotations")
    if annotations is not None:
        faults += _inspect_annotations(annotations, images, categories, mask_format)
    annotated = {str(a.get("image_id")) for a in annotations or () if isinstance(a, dict)}
    return Inspection(
        json_file=str(json_file),
        images=len(coco["images"]),
        unannotated=sum(str(image_id) not in annotated for image_id in images),
        objects=len(annotations or ()),
        categories=len(coco["categories"]),
        faults=faults,
    )


def _where(image: dict, annotation: dict | None = None) -> str:
    text = f"{image['file_name']!r} image {image['id']}"
    return text if annotation is None else f"{text} annotation {annotation['id']}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _inspect_images(entries: list) -> tuple[dict[int, dict], list[Fault]]:
    images: dict[int, dict] = {}
    faults, files = [], set()
    for number, entry in enumerate(entries):
        place = f"entry {number} of 'images'"
        if not isinstance(entry, dict):
            faults.append(Fault("malformed", place, "not an object"))
        elif type(entry.get("id")) is not int or not isinstance(entry.get("file_name"), str):
            faults.append(Fault("malformed", place, "without a whole 'id' or a 'file_name'"))
        elif not (_is_positive(entry.get("width")) and _is_positive(entry.get("height"))):
            faults.append(Fault("malformed", _where(entry), "without 'width' and 'height'"))
        elif entry["id"] in images:
            faults.append(Fault("duplicate id", _where(entry), "an image has it already"))
        else:
            if entry["file_name"] in files:
                faults.append(Fault("same file", _where(entry)))
            files.add(entry["file_name"])
            images[entry["id"]] = entry
    return images, faults


def _inspect_categories(entries: list, faults: list[Fault]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        place = f"entry {number} of 'categories'"
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            faults.append(Fault("malformed", place, "without a whole 'id'"))
        elif not isinstance(entry.get("name"), str):
            faults.append(Fault("malformed", place, "without a 'name'"))
        elif entry["id"] in categories:
            faults.append(Fault("duplicate id", f"category {entry['id']}"))
        else:
            if entry["name"] in categories.values():
                faults.append(Fault("same name", f"category {entry['id']}", entry["name"]))
            categories[entry["id"]] = entry["name"]
    if not entries:
        faults.append(Fault("malformed", "'categories'", "empty"))
    return categories


def _find_missing(images: Iterable[dict], root: Path) -> Iterator[Fault]:
    # One listing instead of 118,000 questions to a network disk.
    present = {path.name for path in root.iterdir()}
    for image in images:
        name = image["file_name"]
        if name not in present and not (root / name).is_file():
            yield Fault("no image", _where(image))


def _inspect_file(image: dict, root: Path) -> Fault | None:
    try:
        with Image.open(root / image["file_name"]) as file:
            width, height = file.size
            # Detectron2 turns images as EXIF says, before it compares sizes.
            if file.getexif().get(274, 1) in (5, 6, 7, 8):
                width, height = height, width
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return Fault("unreadable image", _where(image), str(error))
    if (width, height) != (image["width"], image["height"]):
        said = f"{width}x{height}, in the JSON {image['width']}x{image['height']}"
        return Fault("other size", _where(image), said)
    return None


def _inspect_annotations(
    entries: list, images: dict[int, dict], categories: dict[int, str], mask_format: str | None
) -> Iterator[Fault]:
    seen: set[int] = set()
    used: set[int] = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            place = f"entry {number} of 'annotations'"
            yield Fault("malformed", place, "without a whole 'id'")
            continue
        place = f"annotation {entry['id']}"
        image_id, category = entry.get("image_id"), entry.get("category_id")
        if type(image_id) is not int or type(category) is not int:
            yield Fault("malformed", place, "without a whole 'image_id' and 'category_id'")
            continue
        image = images.get(image_id)
        if image is None:
            yield Fault("unknown image", place, f"image {image_id}")
            continue
        where = _where(image, entry)
        if entry["id"] in seen:
            yield Fault("duplicate id", where, "an annotation has it already")
        seen.add(entry["id"])
        used.add(category)
        if category not in categories:
            yield Fault("unknown category", where, f"category {category}")
        if entry.get("ignore"):
            yield Fault("ignored", where)
        yield from _inspect_box(entry, image, where)
        yield from _inspect_mask(entry, image, where, mask_format)
    if not entries:
        yield Fault("no annotations", "'annotations'")
    else:
        for unused in categories.keys() - used:
            yield Fault("empty category", f"category {unused}", categories[unused])


def _inspect_box(annotation: dict, image: dict, where: str) -> Iterator[Fault]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        yield Fault("malformed", where, f"bbox {box} is not [x, y, width, height]")
        return
    x, y, width, height = box
    if width < 0 or height < 0:
        yield Fault("malformed", where, f"bbox {box} has a negative size")
        return
    right, bottom = image["width"], image["height"]
    if not width or not height or annotation.get("area") == 0:
        yield Fault("zero area", where, f"bbox {box}, area {annotation.get('area')}")
    elif x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        yield Fault("outside", where, f"bbox {box} in {right}x{bottom}")
    elif min(x, y, right - x - width, bottom - y - height) < -_TOLERANCE:
        yield Fault("partly outside", where, f"bbox {box} in {right}x{bottom}")


def _inspect_mask(
    annotation: dict, image: dict, where: str, mask_format: str | None
) -> Iterator[Fault]:
    mask, crowd = annotation.get("segmentation"), annotation.get("iscrowd")
    if not mask:
        if mask_format and not crowd:
            yield Fault("no mask", where)
    elif isinstance(mask, dict):
        if not {"counts", "size"} <= mask.keys():
            yield Fault("malformed", where, "RLE without 'counts' and 'size'")
        elif list(mask["size"]) != [image["height"], image["width"]]:
            yield Fault("malformed", where, f"RLE of size {mask['size']}")
        elif mask_format == "polygon" and not crowd:
            yield Fault("RLE mask", where)
    elif not isinstance(mask, list) or not all(isinstance(part, list) for part in mask):
        yield Fault("malformed", where, "segmentation is neither polygons nor RLE")
    elif not all(_is_number(value) for part in mask for value in part):
        yield Fault("malformed", where, "a polygon has values that are no numbers")
    elif not any(len(part) >= 6 and len(part) % 2 == 0 for part in mask):
        yield Fault("bad polygon", where)

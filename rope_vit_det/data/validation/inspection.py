"""Validates datasets, COCO's files and dicts alike: every fault with its file and id."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

from ...errors import InputError
from ...utils.arguments import is_id, is_number, is_positive
from ...utils.image_files import for_each_file, image_size
from ..coco_file import is_polygon
from ..rle_masks import as_rle
from .faults import ANY_USE, UNUSED, Fault, Inspection, Use

# Pixels by which annotation tools round a box beyond the image.
_TOLERANCE = 1.0
_PLACE = "dict {} of the list"
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


def inspect_coco(
    coco: dict[str, Any], json_file: str, image_root: str | PathLike | None, use: Use = ANY_USE
) -> Inspection:
    """Looks at every image entry, image file, annotation and category.

    Args:
        coco: the parsed JSON, with the lists "images", "categories" and, unless nothing is
            annotated, "annotations".
        json_file: where it comes from, for the messages.
        image_root: folder of the images; files at an address such as s3:// are not looked at, nor
            is any where it is None.
        use: of the dataset.
    """
    images, faults = _inspect_images(coco["images"])
    categories = _inspect_categories(coco["categories"], faults)
    if image_root is not None and "://" not in str(image_root):
        faults += _inspect_files(list(images.values()), image_root, use)
    annotations = coco.get("annotations")
    if annotations is not None:
        faults += _inspect_annotations(annotations, images, categories, use)
    counts = _count_entries(coco["images"], images, annotations or ())
    classes = [name for _, name in sorted(categories.items())]
    return Inspection(str(json_file), *counts, classes, faults)


def inspect_dicts(
    records: Sequence[Any], name: str, classes: Sequence[str] | None, use: Use = ANY_USE
) -> Inspection:
    """Looks at every dict of a dataset, its image file and its annotations.

    Messages number annotations through the dataset, from 1, as Detectron2 does where it makes a
    COCO file of it.

    Args:
        records: in Detectron2's format; left as they are.
        name: of the dataset.
        classes: its thing_classes; None: any category will do.
        use: of the dataset.
    """
    dicts = [record for record in records if isinstance(record, Mapping)]
    ids = [_plain(record.get("image_id")) for record in dicts]
    by_id = use.for_coco or (all(map(is_id, ids)) and len({*ids}) == len(ids))

    def read(numbered: tuple[int, Any]) -> Any:
        return _image(*numbered, by_id, use.for_coco)

    entries = for_each_file(read, [*enumerate(records)], "Reading sizes")
    images, faults = _inspect_images(entries, _PLACE, "image_id")
    faults += _inspect_files([e for e in images.values() if e["is_file"]], "", use)
    annotations: list[Any] = []
    if any("annotations" in record for record in dicts):
        found: list[Any] = []
        good = {id(entry) for entry in images.values()}
        for record, entry in zip(records, entries, strict=True):
            if id(entry) in good:
                found += _annotations(record, entry, len(found), use.is_test)
        annotations = [each for each in found if not isinstance(each, Fault)]
        faults += [each for each in found if isinstance(each, Fault)]
        used = {c for c in (each.get("category_id") for each in annotations) if is_id(c)}
        known = enumerate(classes) if classes is not None else ((c, "") for c in used)
        faults += _inspect_annotations(annotations, images, dict(known), use)
    elif use.needs_objects:
        faults.append(Fault("no annotations", "'annotations'"))
    counts = _count_entries(records, images, annotations)
    return Inspection(f"dataset {name!r}", *counts, classes, faults, holder="the dataset")


def _count_entries(
    entries: Sequence[Any], images: Mapping[int, dict], annotations: Sequence[Any]
) -> tuple[int, int, int]:
    """How many images there are, how many of them without annotations, and how many of these.

    Args:
        entries: of images, the faulty ones too.
        images: the good ones.
    """
    annotated = {str(a.get("image_id")) for a in annotations if isinstance(a, dict)}
    unannotated = sum(str(image_id) not in annotated for image_id in images)
    return len(entries), unannotated, len(annotations)


def _inspect_files(images: Sequence[dict], root: str | PathLike, use: Use) -> list[Fault]:
    """The faults of image files: missing, unreadable, of another size, too thin.

    Args:
        images: with "id", "file_name" and, where they are known, "width" and "height".
        root: the folder that file names start from.
    """
    root = Path(root)
    # One listing instead of 118,000 questions to a network disk.
    present = {e.name for e in os.scandir(root) if e.is_file()} if str(root) != "." else set()

    def inspect(image: dict) -> Fault | None:
        name, where = image["file_name"], where_is(image)
        try:
            if name not in present and not (root / name).is_file():
                return Fault("skipped image" if use.skips_images else "no image", where)
            width, height = image_size(root / name)
        except (InputError, ValueError) as error:  # of what can be no file name
            kind = "skipped image" if use.skips_images else "unreadable image"
            return Fault(kind, where, str(error))
        said = (image.get("width", width), image.get("height", height))
        if (width, height) != said:
            return Fault("other size", where, f"{width}x{height}, not {said[0]}x{said[1]}")
        if use.max_aspect and max(width, height) >= use.max_aspect * min(width, height):
            return Fault("too thin", where, f"{width}x{height}")
        return None

    return [fault for fault in for_each_file(inspect, images, f"Looking at {root}") if fault]


def where_is(image: dict, annotation: dict | None = None) -> str:
    """Names an image, or an annotation of it, for a message."""
    text = f"{image['file_name']!r} image {image['id']}"
    return text if annotation is None else f"{text} annotation {annotation['id']}"


def _inspect_images(
    entries: Sequence[Any], place: str = "entry {} of 'images'", id_key: str = "id"
) -> tuple[dict[int, dict], list[Fault]]:
    """Image entries, by their ids, and their faults.

    Args:
        place: names an entry by its number.
        id_key: what its "id" is called where the user wrote it.
    """
    images: dict[int, dict] = {}
    faults, files = [], set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.append(Fault("malformed", place.format(number), "not an object"))
        elif not is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            detail = f"without a whole {id_key!r} or a 'file_name'"
            faults.append(Fault("malformed", place.format(number), detail))
        elif not (is_positive(entry.get("width")) and is_positive(entry.get("height"))):
            faults.append(Fault("malformed", where_is(entry), "without 'width' and 'height'"))
        elif entry["id"] in images:
            faults.append(Fault("duplicate id", where_is(entry), "an image has it already"))
        else:
            if entry["file_name"] in files:
                faults.append(Fault("same file", where_is(entry)))
            files.add(entry["file_name"])
            images[entry["id"]] = entry
    if not entries:
        faults.append(Fault("no images", "'images'", "empty"))
    return images, faults


def _inspect_categories(entries: list, faults: list[Fault]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        place = f"entry {number} of 'categories'"
        if not isinstance(entry, dict) or not is_id(entry.get("id")):
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


def _inspect_annotations(
    entries: Sequence[Any], images: dict[int, dict], categories: dict[int, str], use: Use
) -> Iterator[Fault]:
    """The faults of annotations; see :func:`inspect_coco`.

    Args:
        entries: of COCO's format.
        images: good entries, by id.
        categories: names by id.
    """
    seen: set[int] = set()
    used: set[int] = set()
    learnable = 0
    for number, entry in enumerate(entries):
        faults = list(_inspect_annotation(number, entry, images, categories, use))
        yield from faults
        if any(fault.kind in ("malformed", "unknown image") for fault in faults):
            continue
        if entry["id"] in seen:
            place = where_is(images[entry["image_id"]], entry)
            yield Fault("duplicate id", place, "an annotation has it already")
        seen.add(entry["id"])
        used.add(entry["category_id"])
        learnable += not entry.get("iscrowd") and not any(f.kind in UNUSED for f in faults)
    if not entries:
        yield Fault("no annotations", "'annotations'")
        return
    if not learnable and not use.is_test:
        yield Fault("nothing to learn", "'annotations'")
    for unused in categories.keys() - used:
        yield Fault("empty category", f"category {unused}", categories[unused])


def _inspect_annotation(
    number: int, entry: Any, images: dict[int, dict], categories: dict[int, str], use: Use
) -> Iterator[Fault]:
    if not isinstance(entry, dict) or not is_id(entry.get("id")):
        yield Fault("malformed", f"entry {number} of 'annotations'", "without a whole 'id'")
        return
    place = f"annotation {entry['id']}"
    image_id, category = entry.get("image_id"), entry.get("category_id")
    if not is_id(image_id) or not is_id(category):
        yield Fault("malformed", place, "without a whole 'image_id' and 'category_id'")
        return
    image = images.get(image_id) if image_id is not None else None
    if image is None:
        yield Fault("unknown image", place, f"image {image_id}")
        return
    where = where_is(image, entry)
    if category not in categories:
        yield Fault("unknown category", where, f"category {category}")
    if entry.get("ignore"):
        yield Fault("ignored", where)
    if entry.get("iscrowd", 0) not in (0, 1):
        yield Fault("malformed", where, f"iscrowd {entry['iscrowd']!r} is not 0 or 1")
    yield from _inspect_box(entry, image, where)
    yield from _inspect_mask(entry, image, where, use.mask_format)
    points = entry.get("keypoints") or []
    if not isinstance(points, list) or len(points) % 3 or not all(map(is_number, points)):
        yield Fault("malformed", where, "keypoints are not a list of x, y, visibility")
    elif use.num_keypoints and len(points) not in (0, 3 * use.num_keypoints):
        yield Fault("keypoints", where, f"{len(points) // 3}, not {use.num_keypoints}")


def _inspect_box(annotation: dict, image: dict, where: str) -> Iterator[Fault]:
    box, area = annotation.get("bbox"), annotation.get("area", 1)
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        yield Fault("malformed", where, f"bbox {box} is not [x, y, width, height]")
        return
    x, y, width, height = box
    right, bottom = image["width"], image["height"]
    if width < 0 or height < 0:
        yield Fault("malformed", where, f"bbox {box} has a negative size")
    elif not is_number(area) or area < 0:
        yield Fault("malformed", where, f"area {area!r} is not a number of 0 or more")
    elif not width or not height:
        yield Fault("zero area", where, f"bbox {box}")
    elif x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        yield Fault("outside", where, f"bbox {box} in {right}x{bottom}")
    elif min(x, y, right - x - width, bottom - y - height) < -_TOLERANCE:
        yield Fault("partly outside", where, f"bbox {box} in {right}x{bottom}")


def _inspect_mask(
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
        if isinstance(counts, str):
            counts = toUncompressedRLE([as_rle(mask)])[0]["counts"]
    except (ValueError, RuntimeError):
        return "RLE whose counts are damaged"
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return "RLE whose counts are not whole numbers of 0 or more"
    pixels = image["height"] * image["width"]
    if sum(counts) != pixels:
        return f"RLE of {sum(counts)} pixels, in an image of {pixels}, is damaged"
    return None


def _image(number: int, record: Any, by_id: bool, for_coco: bool) -> Any:
    """Its entry; "is_file": whether there is a file to look at."""
    if not isinstance(record, Mapping):
        return record
    file = record.get("file_name")
    path = os.fspath(file) if isinstance(file, str | os.PathLike) else None
    entry: dict[str, Any] = {
        "id": _plain(record.get("image_id")) if by_id else number,
        # Whoever reads pixels from elsewhere has a mapper of their own.
        "file_name": path if path is not None or for_coco else _PLACE.format(number),
        "is_file": path is not None and "://" not in path,
    }
    entry |= {key: _plain(record[key]) for key in ("width", "height") if key in record}
    if entry["is_file"] and not for_coco and not entry.keys() & {"width", "height"}:
        with suppress(InputError):  # training takes the file's
            entry["width"], entry["height"] = image_size(entry["file_name"])
    return entry


def _annotations(record: Mapping, image: dict, before: int, is_test: bool) -> list[Any]:
    """COCO's entries of the annotations of a dict, or faults in their places.

    Args:
        before: how many there are in the dicts before.
    """
    found = record.get("annotations")
    if found is None and not is_test:
        return [Fault("malformed", where_is(image), "without 'annotations' (of nothing: [])")]
    if not isinstance(found, Sequence | None):
        return [Fault("malformed", where_is(image), "'annotations' is no list")]
    return [
        _annotation(each, before + i, image, is_test) for i, each in enumerate(found or (), start=1)
    ]


def _annotation(given: Any, number: int, image: dict, is_test: bool) -> dict | Fault:
    where = where_is(image, {"id": number})
    if not isinstance(given, Mapping):
        return Fault("malformed", where, "not a dict")
    entry = {key: _plain(value) for key, value in given.items()}
    entry |= {"id": number, "image_id": image["id"]}
    if hasattr(given.get("segmentation"), "tolist"):  # pixels are none of Detectron2's forms
        entry["segmentation"] = "an array"
    mask = entry.get("segmentation")
    is_used = is_test or not entry.get("iscrowd")  # crowds are not learned from
    if is_used and isinstance(mask, dict) and isinstance(mask.get("counts"), list):
        remedy = "pycocotools.mask.frPyObjects(rle, *rle['size']) compresses them"
        return Fault("malformed", where, f"RLE whose counts are plain numbers; {remedy}")
    box, mode = entry.get("bbox"), given.get("bbox_mode")
    if mode not in _MODES:
        said = f"bbox_mode {mode!r}" if "bbox_mode" in given else "without a bbox_mode"
        return Fault("malformed", where, f"{said}; give BoxMode.XYXY_ABS or BoxMode.XYWH_ABS")
    if isinstance(box, list) and all(map(is_number, box)):  # else the rule for boxes refuses it
        if mode == BoxMode.XYWHA_ABS and len(box) == 5:
            box, mode = BoxMode.convert(box, mode, BoxMode.XYXY_ABS), BoxMode.XYXY_ABS
        if mode == BoxMode.XYXY_ABS and len(box) == 4:
            entry["bbox"] = [*box[:2], box[2] - box[0], box[3] - box[1]]
    return entry


def _plain(value: Any) -> Any:
    """What JSON has in place of arrays, NumPy's numbers, tuples and bytes."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):  # RLE, as pycocotools encodes it
        return value.decode("ascii", "replace")
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value

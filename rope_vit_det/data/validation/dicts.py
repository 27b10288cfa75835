"""Datasets that a function returns, as the entries that COCO's rules know."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from detectron2.structures import BoxMode

from ...errors import InputError
from ...utils.arguments import is_id, is_number
from ...utils.image_files import for_each_file, image_size
from .faults import ANY_USE, Fault, Inspection, Use
from .inspection import inspect_annotations, inspect_files, inspect_images, summed_up, where_is

_PLACE = "dict {} of the list"
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


def inspect_dicts(
    records: Sequence[Any],
    name: str,
    classes: Sequence[str] | None,
    use: Use = ANY_USE,
    *,
    for_coco: bool = False,
    needs_objects: bool = False,
) -> Inspection:
    """Looks at every dict of a dataset, its image file and its annotations.

    Messages number annotations through the dataset, from 1, as Detectron2 does where it makes a
    COCO file of it.

    Args:
        records: in Detectron2's format; left as they are.
        name: of the dataset.
        classes: its thing_classes; None: any category will do.
        use: of the dataset.
        for_coco: to be evaluated by COCO's rules, which find images by their ids and sizes.
        needs_objects: a detector is to learn from it.
    """
    dicts = [record for record in records if isinstance(record, Mapping)]
    ids = [_plain(record.get("image_id")) for record in dicts]
    by_id = for_coco or (all(map(is_id, ids)) and len({*ids}) == len(ids))
    entries = [_image(i, record, by_id, for_coco) for i, record in enumerate(records)]
    if not for_coco:
        _add_sizes(entries)
    images, faults = inspect_images(entries, _PLACE, "image_id")
    faults += inspect_files([e for e in images.values() if e["is_file"]], "", use.max_aspect)
    annotations: list[Any] | None = None
    if any("annotations" in record for record in dicts):
        annotations, count = [], 0
        good = {id(entry) for entry in images.values()}
        for record, entry in zip(records, entries, strict=True):
            if id(entry) in good:
                found = _annotations(record, entry, count, use.is_test)
                count += len(found)
                annotations += [each for each in found if not isinstance(each, Fault)]
                faults += [each for each in found if isinstance(each, Fault)]
        used = {c for c in (each.get("category_id") for each in annotations) if is_id(c)}
        known = enumerate(classes) if classes is not None else ((c, "") for c in used)
        faults += inspect_annotations(annotations, images, dict(known), use)
    elif needs_objects:
        faults.append(Fault("no annotations", "'annotations'"))
    source = f"dataset {name!r}"
    inspection = summed_up(source, records, images, annotations, classes or (), faults)
    return replace(inspection, holder="the dataset")


def _image(number: int, record: Any, by_id: bool, for_coco: bool) -> Any:
    """Its entry; "is_file": whether there is a file to look at."""
    if not isinstance(record, Mapping):
        return record
    file = record.get("file_name")
    path = os.fspath(file) if isinstance(file, str | os.PathLike) else None
    entry = {
        "id": _plain(record.get("image_id")) if by_id else number,
        # Whoever reads pixels from elsewhere has a mapper of their own.
        "file_name": path if path is not None or for_coco else _PLACE.format(number),
        "is_file": path is not None and "://" not in path,
    }
    return entry | {key: _plain(record[key]) for key in ("width", "height") if key in record}


def _add_sizes(entries: list[Any]) -> None:
    """Those of the files, which training takes where a dict has none."""

    def add(entry: dict) -> None:
        with suppress(InputError):  # the look at the file will say what is wrong
            entry["width"], entry["height"] = image_size(entry["file_name"])

    unsized = [e for e in entries if isinstance(e, dict) and not e.keys() & {"width", "height"}]
    for _ in for_each_file(add, [entry for entry in unsized if entry["is_file"]], "Reading sizes"):
        pass


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
    if hasattr(
        given.get("segmentation"), "tolist"
    ):  # a map of pixels is none of Detectron2's forms
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

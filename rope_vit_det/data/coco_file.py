"""Annotations in COCO's format, and dataset dicts: read, cleaned, completed."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from .classes import dataset_classes
from .rle_masks import as_rle

COCO_KEYPOINTS = 17


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it is missing, cannot be read, or is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if "BOM" in str(error):  # COCO's own readers, which come later, do not take it
            raise InputError(
                f"{path} begins with a byte order mark (BOM): save it as UTF-8 without one, as by "
                f"tail -c +4 {path} > other.json"
            ) from None
        raise InputError(f"{path} is not a JSON file: {error}") from None


def read_coco(path: str | os.PathLike, *, needed: tuple[str, ...]) -> dict[str, Any]:
    """COCO instance annotations.

    Args:
        needed: the lists that it must have.

    Raises:
        InputError: it cannot be read, or lacks a list.
    """
    coco = read_json(path)
    for field in needed:
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list):
            raise InputError(
                f"{path} is not COCO instance annotation: it has no list {field!r}; see "
                "https://cocodataset.org/#format-data"
            )
    return coco


def ground_truth(name: str) -> dict[str, Any]:
    """What a registered dataset is evaluated against, in COCO's format, see :func:`complete_coco`.

    It is read from the dataset's `json_file`; where there is none, made of the dicts that its
    function returns now.

    Raises:
        InputError: it cannot be read, or is not what Detectron2's format asks for.
    """
    json_file = MetadataCatalog.get(name).get("json_file", None)
    if json_file is None:
        return complete_coco(_as_coco(name), f"dataset {name!r}")
    content = read_coco(PathManager.get_local_path(json_file), needed=("images", "categories"))
    return complete_coco(content, json_file)


def complete_coco(content: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Any]:
    """Annotations with all that evaluators fail without, or count wrongly without.

    Sizes are whole numbers; "iscrowd" and "area" are there, the latter not 0 but of boxes without a
    size; "segmentation" is where a mask is, see :func:`clean_mask`; annotations of images that are
    not listed are left out.

    Args:
        content: of a JSON file, COCO's or LVIS's; stays as it is.
        source: for the message.

    Raises:
        InputError: an entry has not what COCO's format asks for.
    """
    try:
        images = [_with_whole_numbers(each) for each in content["images"]]
        sizes: dict[Any, tuple[Any, Any]] = {
            each["id"]: (each.get("height"), each.get("width")) for each in images
        }
        # What pycocotools and Detectron2 read of categories, without a word on what they lack.
        dict.fromkeys((each["id"], each["name"]) for each in content["categories"])
        done = {**content, "images": images}
        if "annotations" in content:
            done["annotations"] = [
                _complete(each, sizes[each["image_id"]])
                for each in content["annotations"]
                if each["image_id"] in sizes
            ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} is not COCO instance annotation: {error!r}") from None
    return done


def clean_records(records: Iterable[dict], *, with_masks: bool = False) -> list[dict]:
    """Dataset dicts as Detectron2's mappers and networks need them; those given stay as they are.

    Sizes and image ids are whole numbers, boxes lists; masks are cleaned, see :func:`clean_mask`;
    beside objects with keypoints, one without any has as many that are not labelled.

    Args:
        with_masks: leave out objects whose "segmentation" holds no mask, as Detectron2 does when it
            reads COCO's format.
    """
    records = list(records)
    every = (each for record in records for each in record.get("annotations", ()))
    num_values = next((len(points) for each in every if (points := _keypoints(each))), 0)
    cleaned = []
    for record in records:
        record = _with_whole_numbers(record)
        if "annotations" in record:
            pairs = [(each, _clean(each, num_values)) for each in record["annotations"]]
            record["annotations"] = [
                done
                for given, done in pairs
                if not with_masks or "segmentation" in done or "segmentation" not in given
            ]
        cleaned.append(record)
    return cleaned


def clean_mask(mask: Any) -> list[list[float]] | dict[str, Any] | None:
    """What can be used of a mask; it stays as it is.

    Args:
        mask: polygons or RLE.

    Returns:
        The polygons of three points or more, or compressed RLE, fit for JSON; None: nothing can be.
    """
    if mask is None or not len(mask):
        return None
    if isinstance(mask, Mapping):
        return as_rle(mask)
    parts = [part if isinstance(part, list) else np.asarray(part).tolist() for part in mask]
    return [part for part in parts if is_polygon(part)] or None


def with_clean_mask(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an annotation that has a "segmentation" where it has a mask: :func:`clean_mask`."""
    done = {k: v for k, v in annotation.items() if k != "segmentation"}
    mask = clean_mask(annotation.get("segmentation"))
    return done | {"segmentation": mask} if mask else done


def is_polygon(part: Sequence[float]) -> bool:
    """Whether it has three points or more; pycocotools takes two for a box, and fails on one."""
    return len(part) >= 6 and len(part) % 2 == 0


def to_rle(mask: list | dict, size: tuple[int, int]) -> dict[str, Any]:
    """Compressed RLE of a mask of :func:`clean_mask`.

    Args:
        size: (height, width) of the image.
    """
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, *size))
    return mask


def mask_area(mask: list | dict | None, size: tuple[int, int]) -> float:
    """Pixels of a mask of :func:`clean_mask`, each counted once; 0 of none.

    Args:
        size: (height, width) of the image.
    """
    return float(mask_util.area(to_rle(mask, size))) if mask else 0.0


def _as_coco(name: str) -> dict[str, Any]:
    classes = dataset_classes(name)
    if classes is None:
        raise InputError(
            f"dataset {name!r} has no class names; set thing_classes in its MetadataCatalog entry"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in clean_records(DatasetCatalog.get(name)):
        keys = ("file_name", "height", "width")
        images.append({"id": record["image_id"], **{k: record[k] for k in keys if k in record}})
        for each in record.get("annotations", ()):
            box = [float(value) for value in each["bbox"]]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["image_id"],
                "category_id": classes["ids"][each["category_id"]],
                "bbox": [*map(float, BoxMode.convert(box, each["bbox_mode"], BoxMode.XYWH_ABS))],
                "iscrowd": int(each.get("iscrowd", 0)),
            }
            if "keypoints" in each:  # in COCO's format, the number of a pixel
                annotation["keypoints"] = [
                    float(value) - 0.5 * (i % 3 < 2) for i, value in enumerate(each["keypoints"])
                ]
            annotation |= {k: each[k] for k in ("segmentation",) if k in each}
            annotations.append(annotation)
    categories = [
        {"id": number, "name": each}
        for number, each in zip(classes["ids"], classes["names"], strict=True)
    ]
    content = {"info": {}, "images": images, "categories": categories}
    return content | ({"annotations": annotations} if annotations else {})


def _complete(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    done = with_clean_mask(annotation)
    width, height = done["bbox"][2:]
    done["iscrowd"] = int(done.get("iscrowd") or 0)
    if not done.get("area"):  # some tools write 0 everywhere
        done["area"] = mask_area(done.get("segmentation"), size) or float(width * height)
    return done


def _clean(annotation: Mapping[str, Any], num_values: int) -> dict[str, Any]:
    done = with_clean_mask(annotation)
    if isinstance(done.get("bbox"), np.ndarray):  # which Detectron2's BoxMode does not take alone
        done["bbox"] = done["bbox"].tolist()
    if num_values:
        done["keypoints"] = _keypoints(done) or [0] * num_values
    return done


def _keypoints(annotation: Mapping[str, Any]) -> list[float]:
    points = annotation.get("keypoints")
    return [] if points is None else np.asarray(points).ravel().tolist()


def _with_whole_numbers(image: Mapping[str, Any]) -> dict[str, Any]:
    done = dict(image)
    for key in ("id", "image_id", "height", "width"):
        value = done.get(key)
        # Tools that go through tables write 96.0.
        if isinstance(value, float | np.number) and float(value).is_integer():
            done[key] = int(value)
    return done

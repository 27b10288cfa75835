"""YOLO and Pascal VOC folders as COCO annotations, by the package supervision."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from supervision import DetectionDataset


def convert_to_coco(
    splits: Sequence[tuple[str, str, str]], *, names: str | None = None
) -> list[str]:
    """Writes a JSON file in COCO's format for each split; all of them get the same categories.

    Images without an annotation file, or with an empty one, are kept. Objects have masks where the
    annotations are polygons. Pascal VOC's "difficult" is not kept: COCO's format has no such mark.

    Args:
        splits: of each the JSON file to write, the folder of the images, and that of the
            annotations: YOLO's .txt files or Pascal VOC's .xml files.
        names: YOLO's data.yaml, whose class i becomes category i + 1. None: Pascal VOC, whose
            classes are numbered in the order of the alphabet.

    Returns:
        A line for each file written, and for each folder with annotations of images that are not
        there.

    Raises:
        InputError: supervision is missing, a path is, or the annotations are not of the format.
    """
    try:
        import supervision
    except ImportError:
        raise InputError(
            "the package supervision is missing, which converts; pip install supervision"
        ) from None
    datasets = [_read(images, annotations, names) for _, images, annotations in splits]
    if names is None:
        # Each folder would number the classes as they come.
        whole = supervision.DetectionDataset.merge(datasets)
        datasets = [_part(whole, dataset.image_paths) for dataset in datasets]
    lines = []
    for (json_file, _, annotations), dataset in zip(splits, datasets, strict=True):
        lines += _without_image(Path(annotations), _suffix(names), dataset.image_paths)
        dataset.as_coco(annotations_path=json_file)
        objects = sum(map(len, dataset.annotations.values()))
        lines.append(
            f"{json_file}: {len(dataset)} images, {objects} annotations, "
            f"{len(dataset.classes)} categories"
        )
    return lines


def _read(images: str, annotations: str, names: str | None) -> "DetectionDataset":
    from supervision import DetectionDataset

    for path in filter(None, (images, annotations, names)):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder")
    if not any(Path(annotations).glob("*" + _suffix(names))):
        raise InputError(f"{annotations} has no {_suffix(names)} files")
    try:
        if names is None:
            dataset = DetectionDataset.from_pascal_voc(images, annotations)
        else:
            dataset = DetectionDataset.from_yolo(images, annotations, names)
    except (ValueError, KeyError, IndexError, OSError, ParseError) as error:
        raise InputError(f"{annotations}: {error}") from None
    if not len(dataset):
        raise InputError(f"{images} has no images")
    for detections in dataset.annotations.values():
        # Without it, supervision makes a crowd, which is not learned from, of every object whose
        # mask has several parts.
        detections.data["iscrowd"] = np.zeros(len(detections), dtype=int)
    return dataset


def _suffix(names: str | None) -> str:
    return ".xml" if names is None else ".txt"


def _without_image(folder: Path, suffix: str, image_paths: list[str]) -> list[str]:
    images = {Path(path).stem for path in image_paths} | {"classes"}  # labelImg's classes.txt
    unused = sorted(path.name for path in folder.glob("*" + suffix) if path.stem not in images)
    if not unused:
        return []
    more = ", …" if len(unused) > 3 else ""
    return [
        f"{folder}: {len(unused)} {suffix} files without an image: {', '.join(unused[:3])}{more}"
    ]


def _part(whole: "DetectionDataset", image_paths: list[str]) -> "DetectionDataset":
    annotations = {path: whole.annotations[path] for path in image_paths}
    return type(whole)(whole.classes, image_paths, annotations)

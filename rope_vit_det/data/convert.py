"""YOLO and Pascal VOC folders as COCO annotations, by the package supervision."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, ParseError, parse

import numpy as np
import yaml
from PIL import Image

from ..errors import InputError, check_packages, some_of
from ..utils.atomic_files import check_new_file, new_file
from ..utils.image_files import (
    ORIENTATION,
    SIDEWAYS,
    any_number_of_pixels,
    describe_read_error,
    files_in,
    for_each_file,
)

# What supervision takes for images.
_IMAGES = (".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")

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
        there, or with images that their EXIF data turn.

    Raises:
        InputError: supervision is missing, a path is, a file cannot be read or written, lies in a
            folder below that no split names, or the annotations are not of the format, or for an
            image of another size than the one that is read.
    """
    check_packages("supervision", extra="convert")
    import supervision

    written = [os.path.realpath(json_file) for json_file, *_ in splits]
    for path in written:
        check_new_file(path, force=True)
        if written.count(path) > 1:
            raise InputError(f"two --split write {path}: give each a file of its own")
    _check_folders_below(splits, ".xml" if names is None else ".txt")
    lines: list[str] = []
    with any_number_of_pixels(True):  # large images are sliced by the JSON file
        datasets = [_read(images, annotations, names, lines) for _, images, annotations in splits]
        if names is None:
            # Each folder would number the classes as they come.
            try:
                whole = supervision.DetectionDataset.merge(datasets)
            except ValueError:
                raise InputError("two --split have the same folder of images; name one") from None
            for part in datasets:
                part.classes = whole.classes
                part.annotations = {path: whole.annotations[path] for path in part.image_paths}
        for (json_file, _, _), dataset in zip(splits, datasets, strict=True):
            with new_file(json_file, force=True) as temporary:
                dataset.as_coco(annotations_path=str(temporary))
            objects = sum(map(len, dataset.annotations.values()))
            lines.append(
                f"{json_file}: {len(dataset)} images, {objects} annotations, "
                f"{len(dataset.classes)} categories"
            )
    return lines


def _read(images: str, annotations: str, names: str | None, lines: list[str]) -> "DetectionDataset":
    """A split; lines on what its user should know go to a list."""
    from supervision import DetectionDataset

    suffix = ".xml" if names is None else ".txt"
    for path in filter(None, (images, annotations, names)):
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder")
    if not any(Path(annotations).glob("*" + suffix)):
        raise InputError(f"{annotations} has no {suffix} files")
    has_points = names is not None and _has_points(names)
    found = list(filter(_is_image, Path(images).glob("*")))
    turned = sum(_check_files(found, Path(annotations), suffix))
    if names is not None and not has_points:
        _check_no_pose(Path(annotations), names)
    try:
        if names is None:
            dataset = DetectionDataset.from_pascal_voc(images, annotations)
        else:
            dataset = DetectionDataset.from_yolo(images, annotations, names)
    except (ValueError, OSError) as error:
        raise InputError(f"{annotations}: {error}") from None
    if not len(dataset):
        raise InputError(f"{images} has no images")
    if has_points and any(each.mask is not None for each in dataset.annotations.values()):
        raise InputError(
            f"{annotations} has rows that are neither boxes nor of the kpt_shape in {names}, and "
            "would be read as polygons; correct kpt_shape, or pip install -U supervision"
        )
    for detections in dataset.annotations.values():
        # Without it, supervision makes a crowd, which is not learned from, of every object whose
        # mask has several parts.
        detections.data["iscrowd"] = np.zeros(len(detections), dtype=int)
        if detections.mask is not None:  # has no pixel for an object with only a box
            pixels = detections.area
            detections.data["area"] = np.where(pixels, pixels, detections.box_area)
    lines += _notes(dataset.image_paths, Path(annotations), suffix, turned)
    return dataset


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES


def _check_folders_below(splits: Sequence[tuple[str, str, str]], suffix: str) -> None:
    """Refuses images and their annotations in folders that supervision does not look into."""
    named_images = [images for _, images, _ in splits]
    named_annotations = [annotations for *_, annotations in splits]
    for _, images, annotations in splits:
        without = {path.stem for path in filter(_is_image, Path(images).glob("*"))}
        without -= {path.stem for path in Path(annotations).glob("*" + suffix)}
        _refuse_below(images, named_images, filter(_is_image, map(Path, files_in(images))))
        labels = (path for path in map(Path, files_in(annotations)) if path.suffix == suffix)
        _refuse_below(annotations, named_annotations, (x for x in labels if x.stem in without))


def _refuse_below(folder: str, named: Sequence[str], files: Iterable[Path]) -> None:
    real = set(map(os.path.realpath, named))
    below = Counter(path.parent for path in files)
    lost = {parent: n for parent, n in below.items() if os.path.realpath(parent) not in real}
    if lost:
        raise InputError(
            f"{folder}: {sum(lost.values())} files in folders below it would be left out; give "
            f"{some_of(list(lost))} a --split, or move the files"
        )


def _check_files(images: Sequence[Path], folder: Path, suffix: str) -> list[bool]:
    """Whether each image is turned by its EXIF data.

    Raises:
        InputError: names the image or annotations that cannot be read (of most faults, supervision
            does not name the file), or the VOC file that is not for the image as it is read.
    """
    from supervision.dataset.formats.pascal_voc import detections_from_xml_obj

    def check(path: Path) -> bool:
        try:
            with Image.open(path) as image:
                stored, orientation = image.size, image.getexif().get(ORIENTATION, 1)
        except Exception as error:  # PIL's plugins raise what they like
            raise InputError(f"{path}: {describe_read_error(str(path), error)}") from None
        file, said = folder / (path.stem + suffix), None
        if file.exists():
            try:
                if suffix == ".txt":
                    file.read_text("utf-8")
                else:
                    root = parse(file).getroot()
                    said = _voc_size(root)
                    detections_from_xml_obj(root, [], (1, 1))
            except (ValueError, LookupError, OSError, ParseError) as error:
                raise InputError(f"{file}: {describe_read_error(str(file), error)}") from None
        size = stored[::-1] if orientation in SIDEWAYS else stored
        if said and said != size:
            of, has = ("{}x{}".format(*each) for each in (said, size))
            if said == stored:
                raise InputError(
                    f"{file} is for {path} as it is stored, {of}, and its EXIF data turn it to "
                    f"{has}, as training reads it: remove the tag Orientation from the image, "
                    "whose pixels then stay as they were annotated, or annotate the turned one"
                )
            raise InputError(
                f"{file} is for an image of {of}, and {path} has {has}: take the image that was "
                "annotated, or annotate this one"
            )
        return orientation != 1

    return for_each_file(check, images, f"Looking at {folder}")


def _voc_size(root: Element) -> tuple[int, int] | None:
    """Width and height that a VOC file is for; some tools write none, or 0."""
    with suppress(ValueError):
        size = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
        return (size[0], size[1]) if all(size) else None
    return None


def _has_points(names: str) -> bool:
    """Whether YOLO's data.yaml is of pose labels; its classes must have the labels' numbers."""
    try:
        with open(names, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{names}: {describe_read_error(names, error)}") from None
    if not isinstance(data, dict):  # supervision says so
        return False
    if isinstance(data.get("names"), dict):
        numbers = {str(key).strip() for key in data["names"]}
        for number in range(len(data["names"])):
            if str(number) not in numbers:
                raise InputError(
                    f"{names}: names has no {number}, and the others would be renumbered; give "
                    "every number from 0 on a name, that of a class without labels too"
                )
    return "kpt_shape" in data


def _check_no_pose(folder: Path, names: str) -> None:
    """Refuses keypoints that would be read as polygons.

    Rows of pose labels are of one length, and have the values of a box before their points.
    """
    rows = []
    for file in sorted(folder.glob("*.txt")):
        for row in file.read_text("utf-8", errors="replace").splitlines():
            if len(row.split()) > 6:
                with suppress(ValueError):  # supervision names it
                    rows.append(np.array(row.split()[1:], dtype=float))
    if len({len(row) for row in rows}) == 1 and any(
        (len(rows[0]) - 4) % depth == 0 and all(_is_pose(row, depth) for row in rows)
        for depth in (2, 3)
    ):
        raise InputError(
            f"{folder} has a box and keypoints in each row, as YOLO's pose labels, which would be "
            f"read as polygons; add kpt_shape: [POINTS, 2 or 3] to {names}, and the boxes are taken"
        )


def _is_pose(row: np.ndarray, depth: int) -> bool:
    """Whether what follows the first four values are points (x, y, …) of that box, and span it."""
    centre, size, points = row[:2], row[2:4], row[4:].reshape(-1, depth)
    if depth == 3 and not np.isin(points[:, 2], (0, 1, 2)).all():
        return False
    labelled = points[points[:, :2].any(axis=1), :2]
    fits = (np.abs(labelled - centre) <= size / 2 + 0.01).all()
    in_image = (np.abs(centre - 0.5) + size / 2 <= 0.51).all()
    spans = depth == 3 or not len(labelled) or (np.ptp(labelled, axis=0) > 0.4 * size).any()
    return bool(in_image and fits and spans)


def _notes(image_paths: list[str], folder: Path, suffix: str, turned: int) -> Iterator[str]:
    images = {Path(path).stem for path in image_paths} | {"classes"}  # labelImg's classes.txt
    unused = sorted(path.name for path in folder.glob("*" + suffix) if path.stem not in images)
    if unused:
        yield f"{folder}: {len(unused)} {suffix} files without an image: {some_of(unused)}"
    if turned:
        yield (
            f"{folder}: {turned} images are turned by their EXIF data; their boxes are taken for "
            "the turned image"
        )

"""Large photographs cut into tiles, with their COCO annotations."""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image
from tqdm import tqdm

from ..errors import InputError
from ..utils.arguments import is_whole_number
from ..utils.atomic_files import new_file, new_folder
from ..utils.image_files import any_number_of_pixels, read_rgb
from ..weights.hub import sha256_of
from .classes import registered
from .coco_file import mask_area, read_coco, with_clean_mask
from .rle_masks import box_of, decode_part, encode_part
from .validation.inspection import inspect_coco

# What a dataset for learning must have; photographs without objects are cut like any others.
_OF_LEARNING = ("no annotations", "nothing to learn")
_Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def slice_datasets(
    names: Sequence[str], output: str, *, side: int, overlap: float, min_area: float
) -> list[str]:
    """Cuts registered datasets in COCO's format: OUTPUT/NAME.json, and its PNGs in OUTPUT/NAME/.

    Every tile is kept, also one without objects. Objects are kept in each tile that shows at least
    `min_area` of their area (that of the mask, or of the box where there is none), cut along its
    edges; crowds in each tile that shows something of them. Polygons stay polygons, RLE stays RLE;
    keypoints outside a tile are not labelled in it. Entries of images and annotations keep what
    else they have; `photograph` and `sha256` say what a tile was cut from, `offset` where.

    Args:
        side: pixels of a tile's side; smaller photographs are one tile.
        overlap: of neighbours, as a share of the side.
        min_area: a share above 0, up to 1.

    Returns:
        A line for each dataset.

    Raises:
        InputError: a dataset has no file in COCO's format, or faults; one photograph is in two of
            them, or in another one that was cut into this folder; or something is in the way.
    """
    _check(names, side, overlap, min_area)
    sources = {name: _Source(name) for name in names}
    known = _cut_before(Path(output), names)
    for source in sources.values():
        for image in source.images:
            other, file = known.setdefault(image["sha256"], (source.name, image["file_name"]))
            if other != source.name:
                raise InputError(
                    f"{image['path']} of dataset {source.name!r} is the same photograph as {file} "
                    f"of {other!r}: its tiles would be on both sides of training and validation; "
                    "take it out of one"
                )
    for name in names:
        if Path(output, name).exists() or Path(output, f"{name}.json").exists():
            raise InputError(f"{output} holds tiles of {name!r} already; name another --output")
    lines = []
    for source in sources.values():
        with any_number_of_pixels(True), new_folder(Path(output, source.name)) as folder:
            path = Path(output, f"{source.name}.json")
            lines.append(source.cut(folder, path, side, overlap, min_area))
    return lines


def windows(size: tuple[int, int], side: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(x0, y0, x1, y1) that cover an image, the last of a row or column moved inwards, as SAHI's.

    Args:
        size: (height, width); where it is less than `side`, so is the window.
        side: in pixels.
        overlap: of neighbours, at least, as a share of the side, below 1.
    """
    step = side - int(overlap * side)
    rows, columns = (
        [*range(0, length - side, step), length - side] if length > side else [0] for length in size
    )
    height, width = size
    return [(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def cut_annotation(
    annotation: dict[str, Any], tile: _Box, size: tuple[int, int], min_area: float
) -> dict[str, Any] | None:
    """An annotation in the coordinates of a tile; None where the tile shows too little of it.

    Args:
        annotation: COCO's, its mask parts with three points or more.
        tile: of whole pixels.
        size: (height, width) of the photograph.
        min_area: least share; of a crowd, anything will do.
    """
    x, y, width, height = annotation["bbox"]
    whole = _clip((x, y, x + width, y + height), (0, 0, size[1], size[0]))
    box = _clip(whole, tile)
    mask = annotation.get("segmentation")
    if not _area(box) and not (mask and _area(_clip(_mask_box(mask), tile))):
        return None
    share = _area(box) / _area(whole) if _area(whole) else 0.0
    changed: dict[str, Any] = {}
    all_of_it = mask_area(mask, size)
    if mask:
        cut = _cut_polygons if isinstance(mask, list) else _cut_rle
        changed["segmentation"], around = cut(mask, tile)
    if all_of_it:  # else it is as good as none
        area = mask_area(changed["segmentation"], _size(tile))
        share = area / all_of_it
        if share < 1:
            changed["area"] = area
        if share < 1 or not _area(box):
            box = around
    elif "area" in annotation and share < 1:
        changed["area"] = annotation["area"] * share
    if share <= 0 or (share < min_area and not annotation.get("iscrowd")):
        return None
    if share < 1 or box != whole:
        x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    changed["bbox"] = [x - tile[0], y - tile[1], width, height]
    if annotation.get("keypoints"):
        points = _cut_keypoints(annotation["keypoints"], tile)
        changed |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
    return {**annotation, **changed}


class _Source:
    """A dataset to cut."""

    def __init__(self, name: str) -> None:
        metadata = registered(name, "--dataset")
        json_file = metadata.get("json_file", None)
        if not json_file or not metadata.get("image_root", None):
            raise InputError(
                f"dataset {name!r} is not registered with a file in COCO's format, which is cut; "
                "write one, and name it with --train-json or --val-json"
            )
        self.name, self.json_file = name, json_file
        self.coco = read_coco(json_file, needed=("images", "annotations", "categories"))
        inspection = inspect_coco(self.coco, json_file, None)
        fatal = [fault for fault in inspection.fatal if fault.kind not in _OF_LEARNING]
        if fatal:
            reasons = "; ".join(inspection.describe_faults(fatal))
            raise InputError(f"{json_file} cannot be cut: {reasons}")
        self.images = []
        for image in self.coco["images"]:
            path = Path(metadata.image_root, image["file_name"])
            try:
                self.images.append({**image, "path": path, "sha256": sha256_of(path)})
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}") from None
        self.annotations: dict[int, list[dict]] = {image["id"]: [] for image in self.images}
        for each in self.coco["annotations"]:
            self.annotations.get(each["image_id"], []).append(each)

    def cut(self, folder: Path, path: Path, side: int, overlap: float, min_area: float) -> str:
        """Writes the tiles into a folder, and the JSON file; says what is in it."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        lost = 0
        for image in tqdm(self.images, f"cutting {self.name}", unit="image", disable=None):
            pixels = read_rgb(image["path"])
            size = pixels.shape[:2]
            if size != (image["height"], image["width"]):
                raise InputError(
                    f"{image['path']} has {size[1]}x{size[0]} px, {self.json_file} says "
                    f"{image['width']}x{image['height']}"
                )
            objects = [with_clean_mask(each) for each in self.annotations[image["id"]]]
            tiles = windows(size, side, overlap)
            first = len(images) + 1
            for x0, y0, x1, y1 in tiles:
                entry = {k: v for k, v in image.items() if k != "path"}
                stem = Path(image["file_name"]).stem
                entry |= {
                    "id": len(images) + 1,
                    "file_name": f"{stem}_{image['id']}_{x0}_{y0}.png",
                    "width": x1 - x0,
                    "height": y1 - y0,
                    "photograph": image["file_name"],
                    "offset": [x0, y0],
                }
                Image.fromarray(pixels[y0:y1, x0:x1]).save(folder / entry["file_name"])
                images.append(entry)
            for each in objects:
                before = len(annotations)
                for number, tile in enumerate(tiles, start=first):
                    part = cut_annotation(each, tile, size, min_area)
                    if part:
                        part |= {"id": len(annotations) + 1, "image_id": number}
                        annotations.append(part)
                lost += len(annotations) == before
        with new_file(path, force=False) as temporary:
            coco = {**self.coco, "images": images, "annotations": annotations}
            temporary.write_text(json.dumps(coco), "utf-8")
        text = (
            f"{path}: {len(images)} tiles of {len(self.images)} images, {len(annotations)} "
            f"annotations of {len(self.coco['annotations'])} objects"
        )
        return text + (
            f"; {lost} objects are in no tile to {min_area:g} of their area" * (lost > 0)
        )


def _check(names: Sequence[str], side: int, overlap: float, min_area: float) -> None:
    if not names:
        raise InputError(
            "nothing to cut: name --train-json, --val-json, --config-file or --dataset"
        )
    if not is_whole_number(side, 1):
        raise InputError(f"--size takes pixels of a tile's side, 1 or more, not {side}")
    if not 0 <= overlap < 1:
        raise InputError(f"--overlap takes a share from 0 to below 1, not {overlap}")
    if not 0 < min_area <= 1:
        raise InputError(f"--min-area takes a share above 0, up to 1, not {min_area}")


def _cut_before(output: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Photographs, by sha256, whose tiles lie in the folder: dataset and file name."""
    found = {}
    for path in sorted(output.glob("*.json")):
        if path.stem not in names:
            with suppress(InputError):  # of what is no dataset, such as a run's metrics.json
                for image in read_coco(path, needed=("images",))["images"]:
                    if isinstance(image, dict) and "sha256" in image:
                        found[image["sha256"]] = (path.stem, image.get("photograph", ""))
    return found


def _size(tile: _Box) -> tuple[int, int]:
    return int(tile[3] - tile[1]), int(tile[2] - tile[0])


def _clip(box: _Box, tile: _Box) -> _Box:
    x0, y0, x1, y1 = box
    return max(x0, tile[0]), max(y0, tile[1]), min(x1, tile[2]), min(y1, tile[3])


def _area(box: _Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _cut_polygons(polygons: list[list[float]], tile: _Box) -> tuple[list[list[float]], _Box]:
    """The parts in a tile, in its coordinates, and the box around them in the photograph's."""
    cut: list[np.ndarray] = []
    for polygon in polygons:
        points = np.reshape(polygon, (-1, 2))
        if (points >= tile[:2]).all() and (points <= tile[2:]).all():
            cut.append(points)
            continue
        for part in shapely.get_parts(shapely.intersection(_filled(points), shapely.box(*tile))):
            if isinstance(part, shapely.Polygon) and part.area > 0:
                cut.append(_ring(part))
    moved = [(points - tile[:2]).flatten().tolist() for points in cut]
    return moved, _mask_box(cut) if cut else (0, 0, 0, 0)


def _filled(points: np.ndarray) -> shapely.Geometry:
    """What pycocotools fills of a ring (N, 2) that touches or crosses itself, as where holes hang
    on seams: each point from which a ray crosses the ring an odd number of times.
    """
    shape = shapely.Polygon(points)
    if shape.is_valid:
        return shape
    # Not by make_valid, which takes a seam that crosses another hole for an edge of it.
    faces = shapely.get_parts(shapely.polygonize([shapely.unary_union(shape.exterior)]))
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    inside = []
    for face in faces:
        x, y = shapely.get_coordinates(face.representative_point())[0]
        rows = (y0 > y) != (y1 > y)
        share = (y - y0[rows]) / (y1 - y0)[rows]
        if (x0[rows] + share * (x1 - x0)[rows] > x).sum() % 2:
            inside.append(face)
    return shapely.unary_union(inside)


def _ring(part: shapely.Polygon) -> np.ndarray:
    """Its points (N, 2); a seam to each hole and back again, which fills no pixel, joins the rings.

    A seam may cross anything: what is drawn twice is not there.
    """
    outer, *holes = (np.array(ring.coords) for ring in (part.exterior, *part.interiors))
    return np.concatenate([outer, *(each for hole in holes for each in (hole, outer[:1]))])[:-1]


def _mask_box(mask: Sequence[Any] | dict[str, Any]) -> _Box:
    if isinstance(mask, dict):
        return box_of(mask)
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in mask])
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


@lru_cache(maxsize=1)
def _decoded(counts: str, height: int, width: int) -> tuple[np.ndarray, int, int]:
    return decode_part({"counts": counts, "size": [height, width]})


def _cut_rle(mask: dict[str, Any], tile: _Box) -> tuple[dict[str, Any], _Box]:
    """As :func:`_cut_polygons`, of a mask of run lengths."""
    x0, y0, x1, y1 = (int(value) for value in _clip(box_of(mask), tile))
    if x1 <= x0 or y1 <= y0:
        return encode_part(np.zeros((0, 0)), 0, 0, _size(tile)), (0, 0, 0, 0)
    left, top = int(tile[0]), int(tile[1])
    part, x, y = _decoded(mask["counts"], *mask["size"])
    cut = encode_part(part[y0 - y : y1 - y, x0 - x : x1 - x], x0 - left, y0 - top, _size(tile))
    x0, y0, x1, y1 = box_of(cut)
    return cut, (x0 + left, y0 + top, x1 + left, y1 + top)


def _cut_keypoints(points: list[float], tile: _Box) -> list[float]:
    """Those in the tile, moved; the others (0, 0, 0): not labelled."""
    moved: list[float] = []
    for x, y, visibility in zip(points[::3], points[1::3], points[2::3], strict=True):
        inside = visibility > 0 and tile[0] <= x < tile[2] and tile[1] <= y < tile[3]
        moved += [x - tile[0], y - tile[1], visibility] if inside else [0, 0, 0]
    return moved

"""The generated dataset of the demo: a small COCO with small, occluded and textured objects."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

from ...errors import InputError
from ...utils.atomic_files import new_folder
from .shapes import CATEGORIES, background, coverage, outline, paint

SPLITS = {"train": 800, "val": 80}
SMALL_AREA = 32**2  # pixels; COCO's "small"
_SIZES = ((192, 192), (160, 224), (224, 160), (176, 240), (240, 176), (144, 256))
_NAME = "rope_vit_det_demo"
_SEED = 20261124
# Goes up with every change to what is drawn, so that no stale dataset is used.
_VERSION = 1
_MIN_VISIBLE = 0.5
_CROWD_SHARE = 0.1
_OVERLAP_SHARE = 0.22


@dataclass
class _Object:
    category: str
    whole: np.ndarray  # (H, W) bool, as if nothing lay over it
    visible: np.ndarray  # (H, W) bool


@dataclass
class _Scene:
    image: np.ndarray
    objects: list[_Object] = field(default_factory=list)
    crowd: _Object | None = None


def generate_demo_dataset(root: str | os.PathLike) -> None:
    """Draws the dataset, or takes what an earlier call left, and prints what is in it.

    The layout is COCO's: `annotations/instances_{train,val}.json` and the images in `train/` and
    `val/`. Besides COCO's own keys an annotation has "occluded", the hidden share of the object.
    The same images come out every time.

    Args:
        root: the folder to fill. It appears whole or not at all.

    Raises:
        InputError: the folder exists and is not such a dataset.
    """
    root = Path(root)
    if not root.exists():
        with new_folder(root) as draft:
            for number, (split, count) in enumerate(SPLITS.items()):
                _write_split(draft, split, number, count)
    for split in SPLITS:
        print(_describe(split, _read_annotations(root, split)), flush=True)


def demo_dataset_root() -> Path:
    """Where the dataset belongs: beside Detectron2's own, in `datasets` or DETECTRON2_DATASETS."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / _NAME


def is_demo_dataset(name: str) -> bool:
    """Whether this is what :func:`register_demo_dataset` calls a split."""
    return name in [f"{_NAME}_{split}" for split in SPLITS]


def register_demo_dataset() -> None:
    """Registers `rope_vit_det_demo_train` and `_val` with Detectron2, drawn already or not.

    The tools do so where a config or an option names one of them; a script of your own calls this,
    as often as it likes.
    """
    root = demo_dataset_root()
    for split in SPLITS:
        json_file = root / "annotations" / f"instances_{split}.json"
        name = f"{_NAME}_{split}"
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, str(json_file), str(root / split))


def register_where_named(names: Iterable[str]) -> None:
    """Registers the demo's dataset where a name is, or is a misspelt, one of its splits."""
    if any(name.startswith(_NAME) for name in names):
        register_demo_dataset()


def _read_annotations(root: Path, split: str) -> dict:
    path = root / "annotations" / f"instances_{split}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        coco = json.loads(path.read_text())
        if coco["info"]["version"] == _VERSION:
            return coco
    raise InputError(
        f"{root} exists, but {path} is not this version's demo dataset; delete the folder or name "
        "another one"
    )


def _describe(split: str, coco: dict) -> str:
    objects = [a for a in coco["annotations"] if not a["iscrowd"]]
    small = sum(a["area"] < SMALL_AREA for a in objects) / len(objects)
    occluded = sum(a["occluded"] > 0.25 for a in objects) / len(objects)
    return (
        f"{split}: {len(coco['images'])} images, {len(objects)} objects of "
        f"{len(coco['categories'])} categories and {len(coco['annotations']) - len(objects)} "
        f"crowds; {small:.0%} of the objects under 32x32 pixels, {occluded:.0%} more than a "
        "quarter occluded"
    )


def _write_split(root: Path, split: str, number: int, count: int) -> None:
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        scene = draw_scene(np.random.default_rng((_SEED, number, i)))
        height, width = scene.image.shape[:2]
        name = f"{i:06d}.jpg"
        cv2.imwrite(str(root / split / name), scene.image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        for each in filter(None, (*scene.objects, scene.crowd)):
            numbers = {"id": len(annotations) + 1, "image_id": i + 1}
            annotations.append(numbers | _annotate(each, each is scene.crowd))
    coco = {
        "info": {"description": "rope-vit-det demo, generated", "version": _VERSION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def draw_scene(rng: np.random.Generator) -> _Scene:
    """An image, (H, W, 3) uint8 in BGR, and the objects in it."""
    height, width = _SIZES[rng.integers(len(_SIZES))]
    scene = _Scene(background(rng, height, width))
    if rng.random() < _CROWD_SHARE:
        _add_crowd(rng, scene)
    for _ in range(rng.integers(4, 7)):
        _add_object(rng, scene)
    return scene


def _add_object(rng: np.random.Generator, scene: _Scene) -> None:
    """Adds one object where it hides none too much; where ten places do not do, none."""
    height, width = scene.image.shape[:2]
    category = CATEGORIES[rng.integers(len(CATEGORIES))]
    for _ in range(10):
        radius = rng.uniform(12, 17) if rng.random() < 0.24 else rng.uniform(28, 50)
        centre = _place(rng, scene, radius)
        corners, matrix = outline(rng, category, centre, radius)
        alpha = coverage(corners, height, width)
        mask = alpha > 0.5
        visible = [other.visible & ~mask for other in scene.objects]
        crowded = scene.crowd is not None and (scene.crowd.whole & mask).any()
        if crowded or not all(
            part.sum() >= _MIN_VISIBLE * other.whole.sum() and _has_no_hole(part)
            for part, other in zip(visible, scene.objects, strict=True)
        ):
            continue
        paint(rng, scene.image, category, centre, matrix, alpha)
        for other, part in zip(scene.objects, visible, strict=True):
            other.visible = part
        scene.objects.append(_Object(category, mask, mask))
        return


def _place(rng: np.random.Generator, scene: _Scene, radius: float) -> tuple[float, float]:
    """A centre inside the image: anywhere, or close to an object that it will partly hide."""
    height, width = scene.image.shape[:2]
    margin = min(radius, 30)
    low, high = (margin, margin), (width - margin, height - margin)
    centre = rng.uniform(low, high)
    if scene.objects and rng.random() < _OVERLAP_SHARE:
        ys, xs = np.nonzero(scene.objects[rng.integers(len(scene.objects))].visible)
        i = rng.integers(len(xs))
        centre = np.clip(rng.normal((xs[i], ys[i]), radius / 2), low, high)
    return float(centre[0]), float(centre[1])


def _add_crowd(rng: np.random.Generator, scene: _Scene) -> None:
    """Adds a heap of small objects of one category, too many to tell apart."""
    height, width = scene.image.shape[:2]
    category = CATEGORIES[rng.integers(len(CATEGORIES))]
    middle = rng.uniform((45, 45), (width - 45, height - 45))
    union = np.zeros((height, width), bool)
    for _ in range(rng.integers(14, 25)):
        centre = tuple(rng.normal(middle, 15))
        corners, matrix = outline(rng, category, centre, rng.uniform(6, 10))
        alpha = coverage(corners, height, width)
        paint(rng, scene.image, category, centre, matrix, alpha)
        union |= alpha > 0.5
    scene.crowd = _Object(category, union, union)


def _annotate(each: _Object, is_crowd: bool) -> dict:
    occluded = 1 - each.visible.sum() / each.whole.sum()
    return {
        "category_id": CATEGORIES.index(each.category) + 1,
        "iscrowd": int(is_crowd),
        "segmentation": (_runs if is_crowd else _polygons)(each.visible),
        "area": int(each.visible.sum()),
        "bbox": _box(each.visible),
        "occluded": round(float(occluded), 3),
    }


def _has_no_hole(mask: np.ndarray) -> bool:
    # A polygon cannot say it.
    _, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return hierarchy is not None and bool((hierarchy[0, :, 3] < 0).all())


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask, as COCO writes them: [x, y, x, y, …] in pixels, one list a part."""
    # OpenCV's contours run through the centres of the outermost pixels: on an enlarged mask the
    # half pixel that this loses is small.
    size = 8
    x, y, width, height = _box(mask)
    part = mask[y : y + height, x : x + width].astype(np.uint8)
    fine = np.kron(part, np.ones((size, size), np.uint8))
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, size * 0.6, closed=True)[:, 0]
        if len(points) >= 3:
            polygons.append(np.round((points + 0.5) / size + (x, y), 2).ravel().tolist())
    return polygons


def _box(mask: np.ndarray) -> list[int]:
    return list(cv2.boundingRect(mask.astype(np.uint8)))


def _runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's form of crowd annotations: lengths of runs down the columns, zeros first."""
    return toUncompressedRLE([mask_util.encode(np.asfortranarray(mask, np.uint8))])[0]

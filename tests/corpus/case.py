"""A case: how a good run is spoilt, and what must come of it."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.mask import frPyObjects

SIZE = (96, 72)  # width, height of the images
COUNTS = {"train": 4, "val": 2}
HANDLED, REFUSED = "handled", "refused"
# How a dataset is named: by --train-json and so on, or by DATASETS.TRAIN, of COCO's files or of a
# function.
OWN, REGISTERED, FUNCTION = "own", "registered", "function"


@dataclass
class World:
    """A run that would go well, in a folder, to be spoilt before it starts.

    Attributes:
        folder: holds all files; the working directory of the run.
        coco: "train" and "val" to the content of their JSON files, which lie in
            `SPLIT.json`, beside the images in the folder `SPLIT`.
        flags: options before the keys.
        opts: KEY VALUE, after those that make the run small.
        configs: further --config-file.
        train, test: in place of the names of the registered datasets, if not None.
        split: the one that is spoilt.
        dicts: what functions return, by split.
        classes: their thing_classes, by split; None: they say none.
    """

    folder: Path
    coco: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    opts: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    train: str | None = None
    test: str | None = None
    split: str = "train"
    dicts: dict[str, list[Any]] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)

    @property
    def json(self) -> Path:
        return self.folder / f"{self.split}.json"

    @property
    def image(self) -> Path:
        """The file of the first image."""
        return self.folder / self.split / self.image_entry["file_name"]

    @property
    def image_entry(self) -> dict[str, Any]:
        return self.coco[self.split]["images"][0]

    @property
    def annotation(self) -> dict[str, Any]:
        """The first of the first image."""
        return self.coco[self.split]["annotations"][0]

    def save_image(self, image: Image.Image, name: str, **options: Any) -> None:
        """Puts an image in the place of the first one, and its size into the JSON."""
        self.image.unlink()
        self.image_entry["file_name"] = name
        self.image_entry["width"], self.image_entry["height"] = image.size
        image.save(self.image, **options)
        side = min(image.size)
        for annotation in self.coco[self.split]["annotations"]:
            if annotation["image_id"] == self.image_entry["id"]:
                annotation["bbox"] = [0, 0, side, side]
                annotation["segmentation"] = [[0, 0, side, 0, side, side, 0, side]]

    def write_json(self) -> None:
        for split, content in self.coco.items():
            path = self.folder / f"{split}.json"
            if not path.exists():  # else a case has put something there
                path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Case:
    """One faulty input.

    Attributes:
        name: short; unique.
        how: what is done to a good input.
        spoil: does it.
        outcome: HANDLED or REFUSED.
        says: parts of what is printed, in this order: of the one line of an error, or of the
            log. Empty for what needs no word.
        ways: how the datasets are named.
    """

    name: str
    how: str
    spoil: Callable[[World], object]
    outcome: str
    says: tuple[str, ...] = ()
    ways: tuple[str, ...] = (OWN, REGISTERED)


def good_world(folder: Path) -> World:
    """Four training and two other images of noise, with two objects each and a crowd."""
    rng = np.random.default_rng(0)
    world = World(folder)
    width, height = SIZE
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            name = f"{i}.jpg"
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": i + 1, "file_name": name, "width": width, "height": height})
            for category, left in ((1, 5), (2, 45)):
                annotations.append(_rectangle(len(annotations) + 1, i + 1, category, left))
        pixels = width * height
        rle = {"size": [height, width], "counts": [100, 200, pixels - 300]}
        crowd = _rectangle(len(annotations) + 1, count, 1, 5)
        annotations.append(crowd | {"iscrowd": 1, "segmentation": rle})
        world.coco[split] = {
            "images": images,
            "annotations": annotations,
            "categories": copy.deepcopy(categories),
        }
        world.dicts[split] = [_as_dict(world, split, image) for image in images]
        world.classes[split] = ["cat", "dog"]
    return world


def _as_dict(world: World, split: str, image: dict[str, Any]) -> dict[str, Any]:
    """What Detectron2's reader of COCO's files makes of an image."""
    return {
        "file_name": str(world.folder / split / image["file_name"]),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "annotations": [
            {"bbox": each["bbox"], "iscrowd": each["iscrowd"], "segmentation": _compressed(each)}
            | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": each["category_id"] - 1}
            for each in world.coco[split]["annotations"]
            if each["image_id"] == image["id"]
        ],
    }


def _compressed(annotation: dict[str, Any]) -> Any:
    mask = annotation["segmentation"]
    return frPyObjects(mask, *mask["size"]) if isinstance(mask, dict) else copy.deepcopy(mask)


def _rectangle(number: int, image: int, category: int, left: float) -> dict[str, Any]:
    x, y, w, h = left, 10.0, 40.0, 50.0
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }

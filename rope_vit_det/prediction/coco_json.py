"""Predictions as a file in COCO's format."""

import json
import os
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import Instances

from ..data.classes import Classes, to_coco_results
from ..utils.atomic_files import new_file


class CocoPredictions:
    """Images, categories and annotations with a score, as pycocotools' `COCO` reads them."""

    def __init__(self, classes: Classes) -> None:
        """
        Args:
            classes: of the detector.
        """
        self._classes = classes
        self._images: dict[int, dict[str, Any]] = {}
        self._results: dict[int, list[dict[str, Any]]] = {}

    def add(self, image_id: int, instances: Instances, **fields: Any) -> None:
        """Adds an image; they may come in any order.

        Args:
            instances: on the CPU.
            fields: of the image's entry, beside its id and size.
        """
        height, width = instances.image_size
        self._images[image_id] = {"id": image_id, **fields, "height": height, "width": width}
        self._results[image_id] = to_coco_results(instances, image_id, self._classes["ids"])

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file whole or not at all; one that is there is replaced.

        Raises:
            InputError: it cannot be written.
        """
        ids = sorted(self._images)
        results = [result for image_id in ids for result in self._results[image_id]]
        pairs = zip(self._classes["ids"], self._classes["names"], strict=True)
        coco = {
            "images": [self._images[image_id] for image_id in ids],
            "categories": [{"id": number, "name": name} for number, name in pairs],
            "annotations": [
                {"id": number, **result, "area": _area(result), "iscrowd": 0}
                for number, result in enumerate(results, start=1)
            ],
        }
        with new_file(path, force=True) as temporary:
            temporary.write_text(json.dumps(coco), "utf-8")


def _area(result: dict[str, Any]) -> float:
    if "segmentation" in result:
        return float(mask_util.area(result["segmentation"]))
    return result["bbox"][2] * result["bbox"][3]

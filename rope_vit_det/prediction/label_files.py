"""Predictions as files of other tools: COCO's JSON, YOLO's text files, Label Studio's JSON."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import yaml
from detectron2.structures import Instances

from ..data.classes import Classes, to_coco_results
from ..data.coco_file import complete_coco
from ..data.rle_masks import decode_part
from ..utils.atomic_files import new_file

_POINT = 0.5  # the size of Label Studio's keypoints, in percent of the image's width


class Predictions:
    """What was found in images, to be written for other tools.

    Files are written whole or not at all, and replaced where they are there; those that cannot be
    written raise an InputError.
    """

    def __init__(self, classes: Classes) -> None:
        """
        Args:
            classes: of the detector.
        """
        self._classes = classes
        # The entry of each image in COCO's format, and what was found in it.
        self._results: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def add(self, image_id: int, instances: Instances, **fields: Any) -> None:
        """Adds an image; they may come in any order.

        Args:
            instances: on the CPU.
            fields: of the image's entry in COCO's format, beside its id and size.
        """
        height, width = instances.image_size
        image = {"id": image_id, **fields, "height": height, "width": width}
        self._results[image_id] = image, to_coco_results(instances, image_id, self._classes["ids"])

    def write_coco(self, path: str | os.PathLike) -> None:
        """Images, categories and annotations with a score, as pycocotools' `COCO` reads them."""
        found = [self._results[image_id] for image_id in sorted(self._results)]
        results = [result for _, results in found for result in results]
        pairs = zip(self._classes["ids"], self._classes["names"], strict=True)
        coco = {
            "images": [image for image, _ in found],
            "categories": [{"id": number, "name": name} for number, name in pairs],
            "annotations": [{"id": i, **result} for i, result in enumerate(results, start=1)],
        }
        _write(path, json.dumps(complete_coco(coco, path)))

    def write_yolo(self, folder: str | os.PathLike, labels: Mapping[str, str]) -> None:
        """data.yaml, and for each image a file with a row an object, as Ultralytics reads them.

        A row is a class and a polygon of the mask, or, of networks without masks, a box, and
        keypoints (x, y) after it; all as parts of the image's sides.

        Args:
            labels: the file for each image, by its `file_name`.
        """
        data: dict[str, Any] = {"names": self._classes["names"]}
        for image, results in self._results.values():
            rows = []
            for result in results:
                x, y, width, height = result["bbox"]
                points: Any = [[x + width / 2, y + height / 2], [width, height]]
                if "keypoints" in result:
                    keypoints = _keypoints(result)
                    data["kpt_shape"] = list(keypoints.shape)
                    points += keypoints.tolist()
                elif "segmentation" in result:
                    points = _outline(result, edge=False)
                parts = np.clip(np.divide(points, (image["width"], image["height"])), 0, 1)
                number = self._classes["ids"].index(result["category_id"])
                rows.append(" ".join([str(number), *(f"{part:.6f}" for part in parts.flat)]) + "\n")
            _write(labels[image["file_name"]], "".join(rows))
        _write(Path(folder, "data.yaml"), yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    def write_label_studio(self, path: str | os.PathLike, model: str) -> None:
        """Tasks with predictions, for images that Label Studio serves from local files.

        The tags of the labelling config are called rectangle, polygon (of masks) and keypoint.

        Args:
            model: its name, for the tool to show.
        """
        names = dict(zip(self._classes["ids"], self._classes["names"], strict=True))
        tasks = []
        for image_id, (image, results) in sorted(self._results.items()):
            regions = []
            for i, result in enumerate(results):
                label = names[result["category_id"]]
                for k, (kind, value) in enumerate(_shapes(result, label, image)):
                    regions.append(
                        {
                            "id": f"{image_id}-{i}-{k}",
                            **({"parentID": f"{image_id}-{i}-0"} if k else {}),
                            "from_name": kind,
                            "to_name": "image",
                            "type": f"{kind}labels",
                            "original_width": image["width"],
                            "original_height": image["height"],
                            "image_rotation": 0,
                            "score": result["score"],
                            "value": value,
                        }
                    )
            file = os.path.abspath(image["file_name"]).lstrip("/")
            url = f"/data/local-files/?d={quote(file)}"
            found = {"model_version": model, "result": regions}
            tasks.append({"data": {"image": url}, "predictions": [found]})
        _write(path, json.dumps(tasks))


def _shapes(
    result: dict[str, Any], label: str, image: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What Label Studio draws of an object, each shape with its kind, in percent of the sides."""

    def percent(points: Any) -> list:
        return np.clip(np.divide(points, (image["width"], image["height"])) * 100, 0, 100).tolist()

    if "segmentation" in result:
        points = percent(_outline(result, edge=True))
        yield "polygon", {"points": points, "polygonlabels": [label]}
    else:
        (x, y), (width, height) = percent(np.reshape(result["bbox"], (2, 2)))
        box = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
        yield "rectangle", {**box, "rectanglelabels": [label]}
    if "keypoints" in result:
        # COCO's are indices of pixels.
        for number, (x, y) in enumerate(percent(_keypoints(result) + 0.5), start=1):
            yield "keypoint", {"x": x, "y": y, "width": _POINT, "keypointlabels": [str(number)]}


def _write(path: str | os.PathLike, text: str) -> None:
    with new_file(path, force=True) as temporary:
        temporary.write_text(text, "utf-8")


def _keypoints(result: dict[str, Any]) -> np.ndarray:
    """(K, 2), without their scores."""
    return np.reshape(result["keypoints"], (-1, 3))[:, :2]


def _outline(result: dict[str, Any], *, edge: bool) -> np.ndarray:
    """A mask as one polygon, (P, 2), in pixels, off its outline by less than one.

    Its parts and holes hang together by seams that are walked there and back, as those of
    Ultralytics' converter. A mask of less than three corners is the box.

    Args:
        edge: around the pixels, as shapes have it, not through the outer ones, as those have it
            that count pixels (OpenCV, Ultralytics, supervision).
    """
    part, left, top = decode_part(result["segmentation"])
    loops: list[np.ndarray] = []
    if part.size:
        # Twice as large, where the two sides of a pixel are told apart.
        twice = part.repeat(2, 0).repeat(2, 1)
        for contour in cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]:
            points = cv2.approxPolyDP((contour + edge) // 2, 0.75, True)[:, 0]
            seam = [loops[0][:1], points[:1]] if loops else []
            loops.append(np.concatenate([*seam[:1], points, *seam[1:]]))
    if sum(map(len, loops)) > 2:
        return np.add(np.concatenate(loops), (left, top))
    x, y, width, height = result["bbox"]
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])

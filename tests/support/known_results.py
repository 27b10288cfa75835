"""Results made from ground truth, with mistakes that are known."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO


@dataclass
class KnownResults:
    """Files, and what a matching at score 0.5 must say of them.

    Attributes:
        counts: (found, false, missed) by image id.
        missed: the annotation that no detection is on.
        confused: category ids of the object that was taken for another, and of that other.
    """

    json_file: Path
    images: Path
    results_file: Path
    counts: dict[int, tuple[int, int, int]]
    missed: dict
    confused: tuple[int, int]


def make_known_results(dataset: Path, results_file: Path) -> KnownResults:
    """Detects every object, but misses one of the first image, takes one of the second for another.

    There is a false detection in the third image, and one of a low score in the fourth.

    Args:
        dataset: of the demo.
        results_file: to write.
    """
    json_file = dataset / "annotations" / "instances_val.json"
    truth = COCO(json_file)
    images = sorted(truth.imgs)
    objects = {i: [a for a in truth.imgToAnns[i] if not a["iscrowd"]] for i in images}
    missed, confused = objects[images[0]][0], objects[images[1]][0]
    other = confused["category_id"] % len(truth.cats) + 1
    results = []
    for i in images:
        for annotation in objects[i]:
            if annotation is not missed:
                mask = truth.annToRLE(annotation)
                result = {
                    "image_id": i,
                    "category_id": other if annotation is confused else annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "segmentation": {**mask, "counts": mask["counts"].decode()},
                    "score": 0.9 - 0.01 * len(results),
                }
                results.append(result)
    size = [truth.imgs[images[2]][side] for side in ("height", "width")]
    false = {"image_id": images[2], "category_id": 1, "bbox": [0, 0, 1, 3]}
    false["segmentation"] = {"size": size, "counts": _corner_mask(*size)}
    results += [{**false, "score": 0.6}, {**results[-1], "score": 0.3}]
    results_file.parent.mkdir(parents=True, exist_ok=True)
    results_file.write_text(json.dumps(results))
    counts = {i: (len(objects[i]), 0, 0) for i in images}
    counts[images[0]] = (len(objects[images[0]]) - 1, 0, 1)
    counts[images[1]] = (len(objects[images[1]]) - 1, 1, 1)
    counts[images[2]] = (len(objects[images[2]]), 1, 0)
    pair = (confused["category_id"], other)
    return KnownResults(json_file, dataset / "val", results_file, counts, missed, pair)


def _corner_mask(height: int, width: int) -> str:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[:3, :1] = 1
    return mask_util.encode(mask)["counts"].decode()

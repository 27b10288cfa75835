"""Faulty dicts of functions that users register."""

import numpy as np
from detectron2.structures import BoxMode
from pycocotools.mask import frPyObjects

from .case import FUNCTION, HANDLED, REFUSED, SIZE, Case, World

W, H = SIZE
NAN = float("nan")
RLE = {"size": [H, W], "counts": [100, 200, W * H - 300]}


def _set(split: str = "train", **values):
    return lambda world: world.dicts[split][0]["annotations"][0].update(values)


def _drop(key: str, split: str = "train"):
    return lambda world: world.dicts[split][0]["annotations"][0].pop(key)


def _record(split: str = "train", **values):
    return lambda world: world.dicts[split][0].update(values)


def _without(*keys: str, split: str = "train"):
    return lambda world: [world.dicts[split][0].pop(key) for key in keys]


def _classes(split: str, names):
    return lambda world: world.classes.update({split: names})


def _boxes_as_arrays(world: World) -> None:
    for records in world.dicts.values():
        for record in records:
            for annotation in record["annotations"]:
                annotation["bbox"] = np.array(annotation["bbox"])


def _case(name: str, how: str, spoil, outcome: str, *says: str) -> Case:
    return Case(f"{name}, function", how, spoil, outcome, says, (FUNCTION,))


CASES = [
    _case("good dicts", "nothing is done to them", lambda world: None, HANDLED),
    _case("boxes as arrays", "NumPy's, in XYWH_ABS", _boxes_as_arrays, HANDLED),
    _case("empty list", "the function returns []", lambda w: w.dicts["train"].clear(), REFUSED,
          "dataset 'corpus_train' is empty"),
    _case("no dict", "a file name in the place of a dict",
          lambda world: world.dicts["train"].append("0.jpg"), REFUSED,
          "malformed", "dict 4 of the list (not an object)"),
    _case("category out of range", "category_id 2 of two classes", _set(category_id=2), REFUSED,
          "a category that the dataset lacks", "annotation 1", "category 2"),
    _case("negative category", "category_id -1", _set(category_id=-1), REFUSED,
          "a category that the dataset lacks", "category -1"),
    _case("category out of range, validation", "category_id 2 of two classes",
          _set("val", category_id=2), REFUSED, "'corpus_val'", "category 2"),
    _case("no thing_classes", "the metadata has none", _classes("train", None), REFUSED,
          "dataset 'corpus_train' has thing_classes None", "give the names"),
    _case("classes in another order", "dog and cat for validation",
          _classes("val", ["dog", "cat"]), REFUSED, "different categories", "number 1"),
    _case("more classes", "three names, and NUM_CLASSES is 2",
          lambda world: [_classes(each, ["cat", "dog", "cow"])(world) for each in world.classes],
          REFUSED, "has 3 categories", "set MODEL.ROI_HEADS.NUM_CLASSES 3"),
    _case("box of NaN", "[5, NaN, 9, 9]", _set(bbox=[5, NAN, 9, 9]), REFUSED,
          "malformed", "image 1 annotation 1", "nan"),
    _case("box of NaN, validation", "[5, NaN, 9, 9]", _set("val", bbox=[5, NAN, 9, 9]), REFUSED,
          "malformed", "annotation 1", "nan"),
    _case("turned corners", "XYXY_ABS with the lower corner first",
          _set(bbox=[50, 50, 5, 5], bbox_mode=BoxMode.XYXY_ABS), REFUSED, "negative size"),
    _case("no bbox_mode", "the key lacks", _drop("bbox_mode"), REFUSED,
          "annotation 1 (without a bbox_mode"),
    _case("relative boxes", "BoxMode.XYWH_REL", _set(bbox_mode=BoxMode.XYWH_REL), REFUSED,
          "annotation 1 (bbox_mode", "XYWH_REL"),
    _case("no box", "the key lacks", _drop("bbox"), REFUSED, "annotation 1", "bbox None"),
    _case("partial segmentation", "one annotation without", _drop("segmentation"), REFUSED,
          "without a mask (set MODEL.MASK_ON False", "annotation 1"),
    _case("RLE under polygon", "a good RLE", _set(segmentation=frPyObjects(RLE, H, W)), REFUSED,
          "masks as RLE (set INPUT.MASK_FORMAT bitmask)", "annotation 1"),
    _case("RLE of plain numbers", "counts as a list, which only COCO's reader compresses",
          _set(segmentation=RLE), REFUSED, "annotation 1", "frPyObjects"),
    _case("RLE of plain numbers, validation", "counts as a list", _set("val", segmentation=RLE),
          REFUSED, "annotation 1", "frPyObjects"),
    _case("no annotations", "a dict without the key", _without("annotations"), REFUSED,
          "without 'annotations'"),
    _case("no image id", "training does not need it", _without("image_id"), HANDLED),
    _case("no image id, validation", "COCO's evaluator needs it", _without("image_id", split="val"),
          REFUSED, "without a whole 'image_id'"),
    _case("image id as text, validation", "'0001'", _record("val", image_id="0001"), REFUSED,
          "without a whole 'image_id'"),
    _case("no size", "training takes the file's", _without("width", "height"), HANDLED),
    _case("no size, validation", "COCO's evaluator needs it",
          _without("width", "height", split="val"), REFUSED, "without 'width' and 'height'"),
    _case("another size", "640x480", _record(width=640, height=480), REFUSED,
          "another size than the dataset says", f"({W}x{H}, not 640x480)"),
    _case("missing image", "a file that is not there", _record(file_name="nowhere.jpg"), REFUSED,
          "1 of 4 images that the folder lacks", "nowhere.jpg"),
]  # fmt: skip

"""What functions return is held to the rules of COCO's files; what Detectron2 takes is taken."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from helpers import DEMO_CONFIG
from pycocotools.mask import frPyObjects

from rope_vit_det import add_rope_vit_config
from rope_vit_det.data.demo.shapes import CATEGORIES
from rope_vit_det.data.loader import build_train_loader
from rope_vit_det.data.validation.check import check_datasets
from rope_vit_det.data.validation.faults import Use
from rope_vit_det.data.validation.inspection import inspect_coco, inspect_dicts
from rope_vit_det.errors import InputError

NAN = float("nan")


@pytest.fixture(scope="module")
def records(small_demo_dataset):
    path = small_demo_dataset / "annotations" / "instances_val.json"
    yield load_coco_json(str(path), str(small_demo_dataset / "val"), "dicts_unused")
    MetadataCatalog.remove("dicts_unused")


def _inspect(records, **options):
    before = copy.deepcopy(records)
    use = Use("polygon", **{k: options.pop(k) for k in Use._fields if k in options})
    inspection = inspect_dicts(records, "mine", CATEGORIES, use, **options)
    assert repr(records) == repr(before)
    return inspection


def _first(records):
    return next(a for record in records for a in record["annotations"] if not a["iscrowd"])


def _as_arrays(records):
    for record in records:
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = np.array([x, y, x + w, y + h])
            annotation["bbox_mode"] = 0
            annotation["category_id"] = np.int64(annotation["category_id"])
            mask = annotation["segmentation"]
            if isinstance(mask, list):
                annotation["segmentation"] = [np.array(part) for part in mask]
            elif isinstance(mask["counts"], str):
                mask["counts"] = mask["counts"].encode()


def test_good_dicts_have_no_faults_whatever_holds_their_numbers(records, small_demo_dataset):
    path = small_demo_dataset / "annotations" / "instances_val.json"
    oracle = inspect_coco(json.loads(path.read_text()), path, small_demo_dataset / "val")
    for change in (lambda r: None, _as_arrays):
        changed = copy.deepcopy(records)
        change(changed)
        for options in ({}, {"is_test": True, "for_coco": True}):
            ours = _inspect(changed, **options)
            assert not ours.faults
            assert (ours.images, ours.objects) == (oracle.images, oracle.objects)
            assert ours.unannotated == oracle.unannotated


PLANTED = {
    "category": ({"category_id": 4}, "unknown category"),
    "negative category": ({"category_id": -1}, "unknown category"),
    "NaN": ({"bbox": [5, NAN, 9, 9]}, "malformed"),
    "NaN in an array": ({"bbox": np.array([5, NAN, 9, 9])}, "malformed"),
    "turned": ({"bbox": [50, 50, 9, 9], "bbox_mode": BoxMode.XYXY_ABS}, "malformed"),
    "outside": ({"bbox": [5000, 5, 5010, 9], "bbox_mode": BoxMode.XYXY_ABS}, "outside"),
    "relative": ({"bbox_mode": BoxMode.XYWH_REL}, "malformed"),
    "mode as text": ({"bbox_mode": "xyxy"}, "malformed"),
    "no box": ({"bbox": None}, "malformed"),
    "no mask": ({"segmentation": []}, "no mask"),
    "mask as an array": ({"segmentation": np.zeros((9, 9))}, "malformed"),
    "crowd as text": ({"iscrowd": "no"}, "malformed"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(records, name):
    values, kind = PLANTED[name]
    records = copy.deepcopy(records)
    _first(records).update(values)
    (fault,) = _inspect(records).faults
    assert fault.kind == kind and records[0]["file_name"] in fault.where


def test_keys_that_lack(records):
    def faults(change, **options):
        changed = copy.deepcopy(records)
        change(changed)
        return [(f.kind, f.detail) for f in _inspect(changed, **options).faults]

    coco = {"is_test": True, "for_coco": True}
    (mode,) = faults(lambda r: _first(r).pop("bbox_mode"))
    assert mode[0] == "malformed" and "without a bbox_mode" in mode[1]
    assert faults(lambda r: _first(r).pop("segmentation")) == [("no mask", "")]
    (lists,) = faults(lambda r: r[1].pop("annotations"))
    assert "without 'annotations'" in lists[1]
    assert not faults(lambda r: r[1].pop("annotations"), **coco)
    none = faults(lambda r: [each.pop("annotations") for each in r], needs_objects=True)
    assert none == [("no annotations", "")]
    sizes = faults(lambda r: [r[0].pop("width"), r[0].pop("height")])
    assert not sizes  # training takes the file's
    for change in (
        lambda r: [r[0].pop("width"), r[0].pop("height")],
        lambda r: r[0].update(image_id="0001"),
        lambda r: r[0].pop("image_id"),
        lambda r: r[0].pop("file_name"),
    ):
        (fault,) = faults(change, **coco)
        assert fault[0] == "malformed"
    assert not faults(lambda r: r[0].update(image_id="0001"))
    (half,) = faults(lambda r: r[0].pop("width"))
    assert "without 'width' and 'height'" in half[1]
    (other,) = faults(lambda r: r[0].update(width=640))
    assert other[0] == "other size"
    (twice,) = faults(lambda r: r[1].update(image_id=r[0]["image_id"]), **coco)
    assert twice[0] == "duplicate id"
    (text,) = faults(lambda r: r.append("a.jpg"))
    assert text == ("malformed", "not an object")


def test_rle_under_polygon_is_for_training_a_fault(records):
    records = copy.deepcopy(records)
    size = [records[0]["height"], records[0]["width"]]
    plain = {"size": size, "counts": [10, 20, size[0] * size[1] - 30]}
    _first(records)["segmentation"] = frPyObjects(plain, *size)
    assert [fault.kind for fault in _inspect(records).faults] == ["RLE mask"]
    _first(records)["segmentation"] = plain  # which Detectron2 does not decode
    (fault,) = _inspect(records).faults
    assert fault.kind == "malformed" and "frPyObjects" in fault.detail


@contextlib.contextmanager
def _registered(records, *, train=CATEGORIES, val=CATEGORIES):
    try:
        for split, names in (("train", train), ("val", val)):
            DatasetCatalog.register(f"dicts_{split}", lambda: copy.deepcopy(records))
            metadata = MetadataCatalog.get(f"dicts_{split}").set(evaluator_type="coco")
            if names is not None:
                metadata.thing_classes = list(names)
        yield
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"dicts_{split}")
            MetadataCatalog.remove(f"dicts_{split}")


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("dicts_train",), ("dicts_val",)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SEED = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


def test_classes_of_functions_are_compared(records, cfg):
    with _registered(records):
        assert check_datasets(cfg) == list(CATEGORIES)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        with pytest.raises(InputError, match=r"4 categories.*set MODEL.ROI_HEADS.NUM_CLASSES 4"):
            check_datasets(cfg)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with (
        _registered(records, val=CATEGORIES[::-1]),
        pytest.raises(InputError, match=r"'dicts_val'.*different categories.*number 1"),
    ):
        check_datasets(cfg)
    with (
        _registered(records, train=None),
        pytest.raises(InputError, match="'dicts_train' has thing_classes None: give the names"),
    ):
        check_datasets(cfg)
    with _registered([]), pytest.raises(InputError, match="'dicts_train' is empty"):
        check_datasets(cfg)
    bad = copy.deepcopy(records)
    _first(bad)["bbox"] = [5, NAN, 9, 9]
    with (
        _registered(bad),
        pytest.raises(InputError, match=r"dataset 'dicts_train' has faults.* annotation 1 .*nan"),
    ):
        check_datasets(cfg)


@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS])
def test_boxes_as_arrays_are_learned_as_lists_are(records, cfg, mode):
    def batch(as_array):
        changed = copy.deepcopy(records)
        for record in changed:
            for annotation in record["annotations"]:
                box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], mode)
                annotation |= {"bbox": np.array(box) if as_array else box, "bbox_mode": mode}
        with _registered(changed):
            return next(iter(build_train_loader(cfg)))

    for ours, oracle in zip(batch(True), batch(False), strict=True):
        boxes = [each["instances"].gt_boxes.tensor for each in (ours, oracle)]
        assert len(boxes[0]) and torch.equal(*boxes)

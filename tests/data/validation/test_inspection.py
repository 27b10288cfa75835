"""Faults planted into a good dataset are found, all of them and no others, with file and id."""

import copy
import json

import cv2
import numpy as np
import pytest

from rope_vit_det.data.validation.faults import Use
from rope_vit_det.data.validation.inspection import inspect_coco


@pytest.fixture
def good(small_demo_dataset):
    path = small_demo_dataset / "annotations" / "instances_val.json"
    return json.loads(path.read_text()), path, small_demo_dataset / "val"


def _faults(coco, path, root, **options):
    return inspect_coco(coco, path, root, Use(**options)).faults


def test_a_good_dataset_has_none(good):
    coco, path, root = good
    assert not _faults(coco, path, root, mask_format="polygon")
    inspection = inspect_coco(coco, path, root)
    assert inspection.images == len(coco["images"]) == 4
    assert inspection.unannotated == 0
    assert inspection.objects == len(coco["annotations"])
    assert str(path) in inspection.describe()


def _annotation(coco):
    return next(a for a in coco["annotations"] if not a["iscrowd"])


def _set(entry, **values):
    entry.update(values)


# What is planted -> the kind of fault, and whether it stops a run.
PLANTED = {
    "outside": (lambda c: _set(_annotation(c), bbox=[5000, 5, 10, 10]), "outside", False),
    "partly outside": (
        lambda c: _set(_annotation(c), bbox=[-9, 5, 30, 9]),
        "partly outside",
        False,
    ),
    "zero width": (lambda c: _set(_annotation(c), bbox=[5, 5, 0, 10]), "zero area", False),
    "negative width": (lambda c: _set(_annotation(c), bbox=[50, 5, -9, 10]), "malformed", True),
    "NaN": (lambda c: _set(_annotation(c), bbox=[5, float("nan"), 9, 9]), "malformed", True),
    "text": (lambda c: _set(_annotation(c), bbox=["5", "5", "9", "9"]), "malformed", True),
    "three numbers": (lambda c: _set(_annotation(c), bbox=[5, 5, 9]), "malformed", True),
    "no box": (lambda c: _annotation(c).pop("bbox"), "malformed", True),
    "no id": (lambda c: _annotation(c).pop("id"), "malformed", True),
    "id as text": (lambda c: _set(_annotation(c), image_id="1"), "malformed", True),
    "id as list": (lambda c: _set(_annotation(c), image_id=[1]), "malformed", True),
    "category": (lambda c: _set(_annotation(c), category_id=99), "unknown category", True),
    "image": (lambda c: _set(_annotation(c), image_id=99), "unknown image", False),
    "twice": (lambda c: _set(_annotation(c), id=c["annotations"][-1]["id"]), "duplicate id", True),
    "ignore": (lambda c: _set(_annotation(c), ignore=1), "ignored", True),
    "no mask": (lambda c: _annotation(c).pop("segmentation"), "no mask", True),
    "one point": (lambda c: _set(_annotation(c), segmentation=[[5, 5]]), "bad polygon", False),
    "mask text": (lambda c: _set(_annotation(c), segmentation=[["a"] * 6]), "malformed", True),
    "mask number": (lambda c: _set(_annotation(c), segmentation=7), "malformed", True),
    "image twice": (lambda c: c["images"].append(dict(c["images"][0])), "duplicate id", True),
    "no size": (lambda c: c["images"].append({"id": 77, "file_name": "a"}), "malformed", True),
    "image is text": (lambda c: c["images"].append("000000.jpg"), "malformed", True),
    "no file": (
        lambda c: c["images"].append({"id": 77, "file_name": "a.jpg", "width": 9, "height": 9}),
        "no image",
        True,
    ),
    "file twice": (lambda c: c["images"].append(c["images"][0] | {"id": 77}), "same file", False),
    "class twice": (lambda c: c["categories"].append({"id": 1, "name": "x"}), "duplicate id", True),
    "class without name": (lambda c: c["categories"].append({"id": 9}), "malformed", True),
    "unused class": (
        lambda c: c["categories"].append({"id": 9, "name": "x"}),
        "empty category",
        False,
    ),
    "wrong size": (lambda c: _set(c["images"][0], width=640), "other size", True),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_with_file_and_id(good, name):
    coco, path, root = good
    plant, kind, fatal = PLANTED[name]
    before = copy.deepcopy(_annotation(coco))
    image = next(i for i in coco["images"] if i["id"] == before["image_id"])
    plant(coco)
    faults = _faults(coco, path, root, mask_format="polygon")
    assert {fault.kind for fault in faults} >= {kind}
    assert any(fault.is_fatal for fault in faults) == fatal
    changed = [a for a in coco["annotations"] if a.get("id") == before["id"]]
    if changed and changed[0] != before and changed[0].get("image_id") == before["image_id"]:
        (found,) = (fault for fault in faults if fault.kind == kind)
        assert image["file_name"] in found.where
        assert f"image {image['id']} annotation {before['id']}" in found.where


def test_all_of_several_faults_are_counted(good):
    coco, path, root = good
    for annotation in coco["annotations"][:5]:
        annotation["bbox"] = [9000, 9000, 5, 5]
    coco["annotations"][6]["category_id"] = 50
    inspection = inspect_coco(coco, path, root)
    assert [f.kind for f in inspection.faults] == ["outside"] * 5 + ["unknown category"]
    assert [f.kind for f in inspection.fatal] == ["unknown category"]
    text = inspection.describe()
    assert "5 boxes wholly outside" in text and "1 annotations of a category" in text


def test_an_area_of_0_is_fine(good):
    coco, path, root = good
    for annotation in coco["annotations"]:  # as some tools write everywhere
        annotation["area"] = 0
    assert not _faults(coco, path, root)


def test_boxes_that_touch_the_edge_are_fine(good):
    coco, path, root = good
    image = coco["images"][0]
    for annotation in coco["annotations"]:
        if annotation["image_id"] == image["id"]:
            annotation["bbox"] = [-0.6, 0, image["width"] + 1.2, image["height"] + 0.4]
    assert not _faults(coco, path, root)


def test_masks_as_rle_want_another_mask_format(good):
    coco, path, root = good
    crowd = next((a for a in coco["annotations"] if a["iscrowd"]), None)
    image = next(i for i in coco["images"] if i["id"] == _annotation(coco)["image_id"])
    size = [image["height"], image["width"]]
    _annotation(coco)["segmentation"] = {"size": size, "counts": [10, 20, size[0] * size[1] - 30]}
    kinds = [fault.kind for fault in _faults(coco, path, root, mask_format="polygon")]
    assert kinds == ["RLE mask"]  # and not the crowd, which is always RLE
    assert not _faults(coco, path, root, mask_format="bitmask")
    assert crowd is None or isinstance(crowd["segmentation"], dict)


def test_image_files_are_opened(good, tmp_path):
    coco, path, root = good
    for image in coco["images"]:
        (tmp_path / image["file_name"]).write_bytes((root / image["file_name"]).read_bytes())
    names = [image["file_name"] for image in coco["images"]]
    (tmp_path / names[0]).write_bytes(b"")
    (tmp_path / names[1]).write_text("<html>")
    cv2.imwrite(str(tmp_path / names[2]), np.zeros((7, 9, 3), np.uint8))
    kinds = {f.where.split("'")[1]: f.kind for f in _faults(coco, path, tmp_path)}
    assert kinds == {
        names[0]: "unreadable image",
        names[1]: "unreadable image",
        names[2]: "other size",
    }


def test_images_turned_by_exif_have_the_size_that_detectron2_reads(good, tmp_path):
    from detectron2.data.detection_utils import read_image
    from PIL import Image

    coco, path, _ = good
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    height, width = read_image(str(tmp_path / "turned.jpg")).shape[:2]
    coco["images"] = [{"id": 1, "file_name": "turned.jpg", "width": width, "height": height}]
    coco["annotations"] = []
    kinds = [f.kind for f in _faults(coco, path, tmp_path)]
    assert "other size" not in kinds and (width, height) == (20, 30)


def test_keypoints_of_another_number_than_the_models(good):
    coco, path, root = good
    coco = copy.deepcopy(coco)
    for each, count in zip(coco["annotations"], (17, 0, 5), strict=False):
        each["keypoints"] = [1, 1, 2] * count
    assert not _faults(coco, path, root)
    (fault,) = _faults(coco, path, root, num_keypoints=17)
    assert fault.is_fatal and fault.kind == "keypoints" and fault.detail == "5, not 17"
    assert f"annotation {coco['annotations'][2]['id']}" in fault.where


def test_whole_sizes_written_as_96_0_are_none(good):
    coco, path, root = good
    coco = copy.deepcopy(coco)
    for image in coco["images"]:
        image["width"] = float(image["width"])
    assert not _faults(coco, path, root)
    coco["images"][0]["width"] += 0.5
    assert [fault.kind for fault in _faults(coco, path, root)] == ["other size"]

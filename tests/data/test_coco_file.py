"""What other people's tools write, completed; Detectron2's own conversion is the oracle."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode

from rope_vit_det.data.coco_file import clean_mask, clean_records, complete_coco, ground_truth
from rope_vit_det.errors import InputError

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 40.0, 10.0, 40.0]
POINTS = [12.5, 14.5, 2, 20.5, 30.5, 1]


@pytest.fixture
def records():
    """As a function returns them, with what Detectron2's conversion can digest."""
    rle = mask_util.frPyObjects([SQUARE], 60, 80)[0]
    objects = [
        {"bbox": [10.0, 10, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "segmentation": [SQUARE]},
        {"bbox": np.array([10.0, 10, 20, 30]), "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 1,
         "segmentation": rle},
        {"bbox": [10, 10, 20, 30], "bbox_mode": BoxMode.XYWH_ABS, "keypoints": list(POINTS)},
    ]  # fmt: skip
    for each in objects:
        each["category_id"] = 1
    record = {"file_name": "a.jpg", "image_id": 5, "height": 60, "width": 80}
    yield [{**record, "annotations": objects}, {**record, "image_id": 6}]


@pytest.fixture
def register():
    def register(records, **metadata):
        DatasetCatalog.register("dicts", lambda: records)
        MetadataCatalog.get("dicts").set(**metadata)

    yield register
    DatasetCatalog.pop("dicts", None)
    MetadataCatalog.pop("dicts", None)


@pytest.mark.parametrize("mapping", [{}, {"thing_dataset_id_to_contiguous_id": {3: 0, 7: 1}}])
def test_a_functions_dicts_become_what_detectron2_makes_of_them(records, register, mapping):
    register(records, thing_classes=["cat", "dog"], **mapping)
    given = copy.deepcopy(records)
    ours = ground_truth("dicts")
    assert ground_truth("dicts") == ours  # nothing is changed in place
    for before, after in zip(given[0]["annotations"], records[0]["annotations"], strict=True):
        assert {**before, "bbox": list(before["bbox"])} == {**after, "bbox": list(after["bbox"])}
    oracle = convert_to_coco_dict("dicts")
    assert ours["categories"] == oracle["categories"] and ours["images"] == oracle["images"]
    for each, wanted in zip(ours["annotations"], oracle["annotations"], strict=True):
        # A filled object has the keypoints of the one beside it.
        assert each.pop("keypoints")[:1] == wanted.pop("keypoints", each["bbox"] and [-0.5])[:1]
        wanted.pop("num_keypoints", None)
        assert each == {**wanted, "area": pytest.approx(wanted["area"], rel=0.05)}


def test_what_a_function_leaves_out_is_named(records, register):
    register(records)
    with pytest.raises(InputError, match="'dicts' has no class names; set thing_classes"):
        ground_truth("dicts")


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        ([SQUARE], [SQUARE]),
        ([[5, 5], SQUARE], [SQUARE]),
        ([[5, 5, 9, 9], SQUARE, [], SQUARE[:7]], [SQUARE]),
        ([np.array(SQUARE)], [SQUARE]),
        *((nothing, None) for nothing in (None, [], [[]], [[5, 5]], [[5, 5, 9, 9]], {}, ())),
    ],
)
def test_polygons_of_three_points_stay(mask, wanted):
    assert clean_mask(mask) == wanted


def test_masks_become_compressed_rle():
    pixels = np.zeros((60, 80), bool)
    pixels[10:40, 10:30] = True
    flat = pixels.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    rle = mask_util.encode(np.asfortranarray(pixels, np.uint8))
    for mask in (rle, {"size": [60, 80], "counts": runs}):
        cleaned = clean_mask(mask)
        assert isinstance(cleaned["counts"], str)
        np.testing.assert_array_equal(mask_util.decode(cleaned), pixels)


@pytest.mark.parametrize("area", [{}, {"area": None}, {"area": 0}])
def test_sizes_areas_and_crowds_are_completed(area):
    image = {"id": 1, "file_name": "a.jpg", "height": 60.0, "width": 80}
    objects = [
        {"id": 0, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], **area, **mask}
        for mask in ({"segmentation": [[1, 1], SQUARE]}, {"segmentation": [[1, 1]]}, {})
    ]
    strange = {**objects[0], "image_id": 9}
    content = {"images": [image], "annotations": [*objects, strange], "categories": []}
    before = copy.deepcopy(content)
    done = complete_coco(content, "x.json")
    assert content == before
    assert [each["area"] for each in done["annotations"]] == [
        mask_util.area(mask_util.frPyObjects([SQUARE], 60, 80))[0], 600, 600,
    ]  # fmt: skip
    assert ["segmentation" in each for each in done["annotations"]] == [True, False, False]
    assert all(each["iscrowd"] == 0 for each in done["annotations"])
    assert repr(done["images"][0]["height"]) == "60"
    assert complete_coco(done, "x.json") == done
    del content["annotations"][0]["bbox"]
    with pytest.raises(InputError, match=r"x\.json is not COCO instance annotation: .*bbox"):
        complete_coco(content, "x.json")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("entry", [7, "x", None, {}, {"id": [1]}])
def test_entries_that_are_none_are_named_with_their_file(key, entry):
    content = {"images": [], "annotations": [], "categories": []} | {key: [entry]}
    with pytest.raises(InputError, match=r"^x\.json is not COCO instance annotation: "):
        complete_coco(content, "x.json")


def test_dicts_are_cleaned(records):
    records[0] |= {"height": 60.0, "image_id": np.int64(5)}
    bad = {"bbox": [1, 1, 5, 5], "bbox_mode": 0, "category_id": 0, "segmentation": [[1, 1, 2, 2]]}
    records[0]["annotations"].insert(0, bad)
    for with_masks, count in ((False, 4), (True, 3)):
        record = clean_records(records, with_masks=with_masks)[0]
        assert len(record["annotations"]) == count
        assert [type(record[key]) for key in ("height", "image_id")] == [int, int]
        points = [each["keypoints"] for each in record["annotations"]]
        assert points == [[0] * 6] * (count - 1) + [POINTS]
    assert records[0]["annotations"][0] is bad and "keypoints" not in bad
    assert "segmentation" not in clean_records(records)[0]["annotations"][0]

"""The demo's dataset against pycocotools and its own pictures."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from rope_vit_det.data.demo import dataset as demo
from rope_vit_det.errors import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All of the dataset but most images of training."""
    root = tmp_path_factory.mktemp("demo") / "dataset"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.SPLITS, "train", 200)
        demo.generate_demo_dataset(root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    whole = tmp_path_factory.mktemp("demo") / "dataset"
    demo.generate_demo_dataset(whole)
    return whole


@pytest.mark.parametrize(("split", "least_images"), [("train", 200), ("val", 50)])
def test_it_is_as_hard_as_promised(root, split, least_images):
    _assert_is_hard(root, split, least_images)


@pytest.mark.slow
def test_all_its_training_images_are_as_hard_as_promised(whole):
    _assert_is_hard(whole, "train", 200)


def _assert_is_hard(root, split, least_images):
    coco = COCO(root / "annotations" / f"instances_{split}.json")
    assert len(coco.imgs) >= least_images
    assert len(coco.cats) >= 3
    assert len({image["width"] / image["height"] for image in coco.imgs.values()}) >= 3
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    # Areas from the masks themselves, not from what the file says of them.
    areas = np.array([coco_mask.area(coco.annToRLE(a)) for a in objects])
    assert (areas < 32**2).mean() >= 0.25
    assert np.mean([a["occluded"] > 0.25 for a in objects]) >= 0.20
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert len(crowds) >= 3
    assert all(isinstance(a["segmentation"]["counts"], list) for a in crowds)


def test_annotations_agree_with_pycocotools(root):
    coco = COCO(root / "annotations" / "instances_val.json")
    for a in coco.anns.values():
        mask = coco.annToMask(a)
        image = coco.imgs[a["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        # Polygons keep a mask to within its outermost pixels.
        assert abs(int(mask.sum()) - a["area"]) <= max(4, 0.02 * a["area"])
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        x, y, w, h = a["bbox"]
        assert np.abs(np.subtract(box, (x, y, x + w, y + h))).max() <= 1


def test_no_two_objects_share_a_pixel(root):
    coco = COCO(root / "annotations" / "instances_val.json")
    for image_id in coco.imgs:
        objects = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        total = sum(coco.annToMask(a).astype(int) for a in objects)
        assert (total > 1).mean() < 0.002  # roundings of polygons


@pytest.mark.slow
def test_images_are_as_the_json_says_and_the_same_again(whole, tmp_path):
    again = tmp_path / "again"
    demo.generate_demo_dataset(again)
    for split in ("train", "val"):
        text = (whole / "annotations" / f"instances_{split}.json").read_text()
        assert text == (again / "annotations" / f"instances_{split}.json").read_text()
        for image in json.loads(text)["images"][:20]:
            name = f"{split}/{image['file_name']}"
            assert cv2.imread(str(whole / name)).shape == (image["height"], image["width"], 3)
            assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_an_existing_dataset_is_reused(root):
    before = (root / "train" / "000000.jpg").stat()
    demo.generate_demo_dataset(root)
    assert (root / "train" / "000000.jpg").stat() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not this version's demo dataset"):
        demo.generate_demo_dataset(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_nothing_is_left_when_drawing_is_interrupted(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_annotate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.generate_demo_dataset(tmp_path / "dataset")
    assert list(tmp_path.iterdir()) == []

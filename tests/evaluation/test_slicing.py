"""Evaluation by slices inside a run: what tools/predict.py --slice finds, and AP 100 of what is
perfect."""

import json
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from helpers import DEMO_CONFIG
from PIL import Image

import rope_vit_det
from rope_vit_det.data.rle_masks import as_rle, box_of
from rope_vit_det.engine.setup import check_settings
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.slicing import SlicedModel, find_in_slices

SIDE = 100


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    rope_vit_det.add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.merge_from_list(["TEST.SLICE.ENABLED", True, "TEST.SLICE.SIZE", SIDE])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128])
    return cfg


class Finder(torch.nn.Module):
    """A perfect detector: a bright region of one colour is an object of its channel."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, inputs):
        (item,) = inputs
        height, width = item["height"], item["width"]
        self.shapes.append(tuple(item["image"].shape[1:]))
        image = cv2.resize(
            item["image"].permute(1, 2, 0).numpy(), (width, height), interpolation=cv2.INTER_NEAREST
        )
        boxes, masks, classes = [], [], []
        for channel in range(3):
            count, labels = cv2.connectedComponents((image[:, :, channel] > 128).astype(np.uint8))
            for number in range(1, count):
                mask = labels == number
                x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
                boxes.append([x, y, x + w, y + h])
                masks.append(mask)
                classes.append(channel)
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor(boxes).float().reshape(-1, 4))
        found.scores = torch.ones(len(boxes))
        found.pred_classes = torch.tensor(classes).long()
        found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        return [{"instances": found}]


@pytest.fixture
def squares(tmp_path):
    """Squares of three colours in an image of several slices, one beyond Pillow's limit."""
    coco = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": 5 + i, "name": name} for i, name in enumerate("rgb")]
    for image_id, (height, width) in enumerate([(250, 330), (80, 90), (300, 120)], start=1):
        pixels = np.zeros((height, width, 3), np.uint8)
        name = f"{image_id}.png"
        coco["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        # In the part that two slices share, or in one: whole in one of them at least.
        for number, (x, y) in enumerate([(10, 12), (60, 50), (84, 20), (165, 84), (300, 200)]):
            if x + 14 > width or y + 14 > height:
                continue
            pixels[y : y + 14, x : x + 14, number % 3] = 255
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 5 + number % 3,
                    "bbox": [x, y, 14, 14],
                    "segmentation": [[x, y, x + 14, y, x + 14, y + 14, x, y + 14]],
                    "area": 196,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "squares.json").write_text(json.dumps(coco))
    register_coco_instances("squares", {}, str(tmp_path / "squares.json"), str(tmp_path))
    yield "squares"
    DatasetCatalog.remove("squares")
    MetadataCatalog.remove("squares")


def test_what_is_perfect_in_slices_scores_100(cfg, squares, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    cfg.DATASETS.TEST = (squares,)
    cfg.INPUT.MIN_SIZE_TEST = 0  # the finder wants pixels as they are
    model = Finder()
    results = Trainer.test(cfg, model)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    # Each image whole as well, the second, which is smaller than a slice, once.
    sizes = [(250, 330), (80, 90), (300, 120)]
    assert [each for each in model.shapes if each != (SIDE, SIDE)] == sizes
    assert Image.MAX_IMAGE_PIXELS == 30_000


def voronoi(folder):
    """Cells that leave no gap between them."""
    points = np.random.default_rng(0).uniform(0, 330, (150, 2))
    pixels = np.stack(np.meshgrid(*[np.arange(330)] * 2, indexing="ij"), axis=-1)
    return 1 + np.linalg.norm(pixels[:, :, None] - points, axis=-1).argmin(axis=-1)


def nuclei(folder):
    """125 of a photograph from PyPI's stardist (BSD-3-Clause)."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), "stardist==0.9.2"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return np.array(Image.open(wheel.open("stardist/data/images/mask2d.tif"))).astype(int)


@pytest.mark.parametrize("draw", [voronoi, pytest.param(nuclei, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "side", [100, *(pytest.param(side, marks=pytest.mark.slow) for side in (128, 200))]
)
def test_objects_that_touch_are_put_together_again(cfg, tmp_path, side, draw):
    labels = draw(tmp_path)
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2).astype(np.uint8)).save(
        tmp_path / "labels.png"
    )
    height, width = labels.shape
    coco = {
        "images": [{"id": 1, "file_name": "labels.png", "height": height, "width": width}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {
                "id": int(number),
                "image_id": 1,
                "category_id": 1,
                "bbox": mask_util.toBbox(rle).tolist(),
                "segmentation": as_rle(rle),
                "iscrowd": 0,
            }
            for number in np.unique(labels[labels > 0])
            for rle in [mask_util.encode(np.asfortranarray(labels == number, np.uint8))]
        ],
    }
    (tmp_path / "labels.json").write_text(json.dumps(coco))

    class Perfect(torch.nn.Module):
        def forward(self, inputs):
            image = inputs[0]["image"][0].numpy()
            masks = [image == number for number in np.unique(image[image > 0])]
            rles = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
            boxes = torch.tensor([box_of(rle) for rle in rles]).float().reshape(-1, 4)
            found = Instances(image.shape, pred_boxes=Boxes(boxes), scores=torch.ones(len(rles)))
            found.pred_classes = torch.zeros(len(rles), dtype=torch.int64)
            found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *image.shape))
            return [{"instances": found}]

    register_coco_instances("labels", {}, str(tmp_path / "labels.json"), str(tmp_path))
    try:
        cfg.merge_from_list(["DATASETS.TEST", ("labels",), "INPUT.MIN_SIZE_TEST", 0])
        cfg.merge_from_list(["TEST.SLICE.SIZE", side, "TEST.DETECTIONS_PER_IMAGE", 1000])
        results = Trainer.test(cfg, Perfect())
    finally:
        DatasetCatalog.remove("labels")
        MetadataCatalog.remove("labels")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_only_what_a_border_cuts_grows(cfg):
    """By hand: slices of 100 px at x = 0, 80, 100, in an image of 100x200."""
    image = np.zeros((100, 200, 3), np.uint8)
    image[0, :, 0] = np.arange(200)  # so that a slice knows where it is
    truth = {
        # left: boxes in the image, scores
        0: [((10, 10, 30, 30), 0.9), ((12, 10, 30, 60), 0.8), ((70, 40, 100, 60), 0.7)],
        80: [((81, 40, 130, 60), 0.6), ((110, 70, 140, 90), 0.5), ((150, 5, 160, 15), 0.4)],
        100: [((105, 70, 150, 95), 0.45), ((150, 5, 160, 15), 0.95), ((20, 20, 50, 50), 0)],
    }

    def find(part):
        left, is_whole = int(part[0, 0, 0]), part.shape[1] == 200
        found = Instances(part.shape[:2])
        rows = [] if is_whole else [row for row in truth[left] if row[1]]
        boxes = torch.tensor([box for box, _ in rows]).float().reshape(-1, 4)
        found.pred_boxes = Boxes(boxes - torch.tensor([left, 0, left, 0]))
        found.scores = torch.tensor([score for _, score in rows])
        found.pred_classes = torch.zeros(len(rows), dtype=torch.int64)
        return found

    found = find_in_slices(image, find, side=100, overlap=0.2)
    pairs = zip(found.pred_boxes.tensor.tolist(), found.scores.tolist(), strict=True)
    got = {tuple(box): round(score, 2) for box, score in pairs}
    assert got == {
        (150, 5, 160, 15): 0.95,  # seen twice
        (10, 10, 30, 30): 0.9,  # of one look, both stay
        (12, 10, 30, 60): 0.8,
        (70, 40, 130, 60): 0.7,  # cut, and joined
        (110, 70, 140, 90): 0.5,  # whole, and not
    }


def test_a_run_and_the_predictor_find_the_same(cfg, trained_folder):
    predictor = rope_vit_det.Predictor(trained_folder, threshold=0.2, device="cpu", slice_side=SIDE)
    image = np.random.default_rng(0).integers(0, 255, (170, 150, 3), np.uint8)
    theirs = predictor(image)
    inputs = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 170}
    (ours,) = SlicedModel(cfg, predictor.model)([{**inputs, "width": 150}])
    ours = ours["instances"]
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert np.array_equal(ours.pred_masks, theirs.pred_masks)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.SLICE.SIZE", 0], "TEST.SLICE.SIZE is 0; allowed: .* 32 or more"),
        (["TEST.SLICE.SIZE", 16], "TEST.SLICE.SIZE is 16; allowed: .* 32 or more"),
        (["TEST.SLICE.OVERLAP", 1.0], "TEST.SLICE.OVERLAP is 1.0; allowed"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "TEST.SLICE.ENABLED merges instances"),
    ],
)
def test_wrong_settings_are_refused(cfg, opts, message):
    cfg.merge_from_list([*opts, "MODEL.BACKBONE.NAME", "build_rope_vit_sfp_backbone"])
    with pytest.raises(InputError, match=message):
        check_settings(cfg)

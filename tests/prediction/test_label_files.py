"""What is found, in the formats of other tools, read by what their documentation says of them."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from detectron2.structures import Boxes, Instances
from PIL import Image
from supervision import DetectionDataset

from rope_vit_det.data.rle_masks import RLEMasks, as_rle
from rope_vit_det.prediction.label_files import Predictions

CLASSES = {"names": ["disc", "crate: wood", "größe"], "ids": [3, 7, 20]}
HEIGHT, WIDTH = 90, 160
DOCS = Path(__file__).parents[2] / "docs" / "prediction.md"


def ring(centre, outer, inner):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - centre[0], y - centre[1])
    return (distance <= outer) & (distance >= inner)


def draw_masks():
    """In two parts; with two holes; at the border; one pixel; none at all."""
    masks = np.zeros((5, HEIGHT, WIDTH), bool)
    masks[0] = ring((30, 30), 14, 0) | ring((70, 40), 9, 0)
    masks[1] = ring((110, 45), 30, 8) & ~ring((110, 25), 3, 0)
    masks[2, 80:, 140:] = True
    masks[3, 5, 6] = True
    return masks


def find(masks=None, keypoints=None):
    """Instances with boxes around the masks; that of the empty one is 4 x 6 px."""
    boxes = [[10, 20, 14, 26]] * 5
    for i, mask in enumerate(draw_masks()):
        if mask.any():
            y, x = np.nonzero(mask)
            boxes[i] = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.tensor(boxes).float()))
    instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    instances.pred_classes = torch.tensor([0, 1, 2, 0, 1])
    if masks is not None:
        instances.pred_masks = masks
    if keypoints is not None:
        instances.pred_keypoints = keypoints
    return instances


def as_rles(masks):
    rles = [as_rle(mask_util.encode(np.asfortranarray(mask, np.uint8))) for mask in masks]
    return RLEMasks(rles, (HEIGHT, WIDTH))


def predictions(found, file_name="images/photo.png"):
    files = Predictions(CLASSES)
    none = {"pred_boxes": Boxes(torch.zeros(0, 4)), "scores": torch.zeros(0)}
    none["pred_classes"] = torch.zeros(0, dtype=torch.long)
    files.add(2, Instances((20, 10), **none), file_name="images/ä b%.png")
    files.add(1, found, file_name=file_name)
    return files


def iou(some, others):
    return (some & others).sum() / (some | others).sum()


def read_yolo(files, folder):
    """By supervision; the images that its labels are of lie beside them."""
    labels = {"images/photo.png": folder / "labels/photo.txt"}
    labels["images/ä b%.png"] = folder / "labels/ä b%.txt"
    files.write_yolo(folder, labels)
    (folder / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images/photo.png")
    Image.new("RGB", (10, 20)).save(folder / "images/ä b%.png")
    data = str(folder / "data.yaml")
    dataset = DetectionDataset.from_yolo(str(folder / "images"), str(folder / "labels"), data)
    assert dataset.classes == CLASSES["names"]
    assert len(dataset.annotations[str(folder / "images/ä b%.png")]) == 0
    return dataset.annotations[str(folder / "images/photo.png")]


@pytest.mark.parametrize("encoded", [False, True])
def test_yolos_polygons_are_the_masks(tmp_path, encoded):
    masks = draw_masks()
    found = find(as_rles(masks) if encoded else torch.from_numpy(masks))
    read = read_yolo(predictions(found), tmp_path)
    assert read.class_id.tolist() == found.pred_classes.tolist()  # a row an object
    for ours, theirs in zip(masks[1:3], read.mask[1:3], strict=True):
        assert iou(ours, theirs) > 0.97
    assert read.mask[3][masks[3]].all() and read.mask[3].sum() <= 4
    assert (masks[0] & ~read.mask[0]).sum() < 0.03 * masks[0].sum()
    assert (read.mask[0] & ~masks[0]).sum() < 60  # with the seam from one part to the other
    assert read.mask[4, 20:27, 10:15].all() and read.mask[4].sum() == 7 * 5  # the box


def test_yolos_boxes_are_the_boxes(tmp_path):
    found = find()
    read = read_yolo(predictions(found), tmp_path)
    assert read.mask is None
    np.testing.assert_allclose(read.xyxy, found.pred_boxes.tensor, atol=2e-4)


def test_yolos_keypoints_follow_the_box(tmp_path):
    points = torch.rand(5, 4, 3) * torch.tensor([WIDTH, HEIGHT, 1.0])
    read = read_yolo(predictions(find(keypoints=points.clone())), tmp_path)
    np.testing.assert_allclose(read.xyxy, find().pred_boxes.tensor, atol=2e-4)
    assert yaml.safe_load((tmp_path / "data.yaml").read_text())["kpt_shape"] == [4, 2]
    rows = np.loadtxt(tmp_path / "labels/photo.txt")
    shown = rows[:, 5:].reshape(5, 4, 2) * (WIDTH, HEIGHT)
    # COCO's keypoints, as Detectron2 writes them, are indices of pixels.
    np.testing.assert_allclose(shown, (points[..., :2] - 0.5).clip(0), atol=1e-3)


def label_studio_config():
    """Names of the tags in the docs' labelling configs: tag, and the one that it is for."""
    tags = re.findall(r'<(\w+) name="(\w+)" (?:toName|value)="(\$?\w+)"', DOCS.read_text("utf-8"))
    return {name: (tag, target) for tag, name, target in tags}


def read_label_studio(files, folder):
    """Regions of the first image, each checked by what Label Studio checks of an import."""
    files.write_label_studio(folder / "tasks.json", "a model")
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))
    assert [set(task) for task in tasks] == [{"data", "predictions"}] * 2
    (prediction,), (empty,) = (task["predictions"] for task in tasks)
    assert prediction["model_version"] == "a model" and empty["result"] == []
    config = label_studio_config()
    assert config["image"] == ("Image", "$image") and "image" in tasks[0]["data"]
    regions = prediction["result"]
    assert len({region["id"] for region in regions}) == len(regions)
    for region in regions:
        tag, image = config[region["from_name"]]
        assert region["type"] == tag.lower() and region["to_name"] == image == "image"
        assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
        assert 0 <= region["score"] <= 1
        value = dict(region["value"])
        (label,) = value.pop(region["type"])
        assert label in {"1", "2", "3", "4", *CLASSES["names"]}
        numbers = np.ravel(value.get("points", list(value.values())))
        assert (numbers >= 0).all() and (numbers <= 100).all()
    return tasks, regions


def test_label_studios_polygons_are_the_masks(tmp_path):
    masks = draw_masks()
    tasks, regions = read_label_studio(predictions(find(torch.from_numpy(masks))), tmp_path)
    assert [region["value"]["polygonlabels"] for region in regions] == [
        [CLASSES["names"][number]] for number in (0, 1, 2, 0, 1)
    ]
    assert [round(region["score"], 4) for region in regions] == [0.9, 0.8, 0.7, 0.6, 0.5]
    for mask, region in zip(masks[:3], regions[:3], strict=True):  # drawn ten times as large
        points = np.array(region["value"]["points"]) / 100 * (WIDTH, HEIGHT) * 10
        large = np.zeros((HEIGHT * 10, WIDTH * 10), np.uint8)
        cv2.fillPoly(large, [points.round().astype(np.int32)], 1)
        assert iou(large.astype(bool), mask.repeat(10, 0).repeat(10, 1)) > 0.95
    corners = np.array(regions[3]["value"]["points"]) / 100 * (WIDTH, HEIGHT)
    assert {tuple(each) for each in corners.round(4)} == {(6, 5), (7, 5), (7, 6), (6, 6)}
    paths = [unquote(task["data"]["image"].partition("?d=")[2]) for task in tasks]
    assert ["/" + path for path in paths] == [
        str(Path("images", name).absolute()) for name in ("photo.png", "ä b%.png")
    ]


def test_label_studios_keypoints_belong_to_their_box(tmp_path):
    points = torch.rand(5, 4, 3) * torch.tensor([WIDTH, HEIGHT, 1.0])
    found = find(keypoints=points.clone())
    _, regions = read_label_studio(predictions(found), tmp_path)
    assert [region["type"] for region in regions] == (
        ["rectanglelabels"] + ["keypointlabels"] * 4
    ) * 5
    for i, box in enumerate(found.pred_boxes.tensor.tolist()):
        parent, *children = regions[5 * i : 5 * i + 5]
        x, y, width, height = (parent["value"][key] for key in ("x", "y", "width", "height"))
        shown = np.array([x, y, x + width, y + height]) / 100 * ([WIDTH, HEIGHT] * 2)
        np.testing.assert_allclose(shown, box, atol=1e-4)
        assert {child["parentID"] for child in children} == {parent["id"]}
        assert [child["value"]["keypointlabels"] for child in children] == [
            [str(k)] for k in range(1, 5)
        ]
        shown = [[child["value"][key] / 100 for key in "xy"] for child in children]
        np.testing.assert_allclose(shown * np.array([WIDTH, HEIGHT]), points[i, :, :2], atol=1e-3)


def test_fiftyone_finds_boxes_masks_and_scores_in_the_coco_file(tmp_path):
    """As its importer of COCODetectionDataset documents what it reads."""
    masks = draw_masks()
    found = find(torch.from_numpy(masks))
    path = str(tmp_path / "photo.png")  # an absolute one needs no data_path
    predictions(found, path).write_coco(tmp_path / "found.json")
    coco = json.loads((tmp_path / "found.json").read_text("utf-8"))
    images = {image["id"]: image for image in coco["images"]}
    classes = {category["id"]: category["name"] for category in coco["categories"]}
    assert images[1]["file_name"] == path
    assert [classes[each["category_id"]] for each in coco["annotations"]] == [
        CLASSES["names"][number] for number in (0, 1, 2, 0, 1)
    ]
    for annotation, mask, box in zip(
        coco["annotations"], masks, found.pred_boxes.tensor.tolist(), strict=True
    ):
        x, y, width, height = annotation["bbox"]
        size = (images[annotation["image_id"]]["width"], images[annotation["image_id"]]["height"])
        assert size == (WIDTH, HEIGHT) and [x, y, x + width, y + height] == box
        rows, columns = (slice(round(a), round(a + b)) for a, b in ((y, height), (x, width)))
        pixels = mask_util.decode(annotation["segmentation"]).astype(bool)
        assert (pixels[rows, columns] == mask[rows, columns]).all()
    assert [round(each["score"], 4) for each in coco["annotations"]] == [0.9, 0.8, 0.7, 0.6, 0.5]

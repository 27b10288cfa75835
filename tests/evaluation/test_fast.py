"""Fast evaluation gives the numbers of pycocotools and of lvis."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.fast import TRUTH_FILE, FastCOCOEvaluator, FastLVISEvaluator


def _detections(coco, rng):
    """Predictions as a middling detector makes them, per image: shifted, doubled, mistaken."""
    per_image = []
    ids = sorted(coco.cats)
    for image_id in coco.imgs:
        found = []
        for annotation in coco.imgToAnns[image_id]:
            for _ in range(rng.integers(0, 4)):
                shift = np.round(rng.normal(0, 4, 2)).astype(int)
                mask = np.roll(coco.annToMask(annotation), shift, axis=(0, 1))
                rle = mask_util.encode(np.asfortranarray(mask))
                rle["counts"] = rle["counts"].decode()
                right = rng.random() < 0.8
                category = ids.index(annotation["category_id"]) if right else rng.integers(len(ids))
                found.append(
                    {
                        "image_id": image_id,
                        "category_id": int(category),
                        "bbox": [float(v) for v in mask_util.toBbox(rle)],
                        "segmentation": rle,
                        # ties too
                        "score": float(np.round(rng.random(), 2)),
                    }
                )
        per_image.append({"image_id": image_id, "instances": found})
    return per_image


@pytest.fixture
def evaluated(small_demo_dataset):
    """Name, COCO object and predictions of a registered dataset."""
    path = small_demo_dataset / "annotations" / "instances_train.json"
    register_coco_instances("scored", {}, str(path), str(small_demo_dataset / "train"))
    DatasetCatalog.get("scored")
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    yield "scored", coco, _detections(coco, np.random.default_rng(4))
    DatasetCatalog.remove("scored")
    MetadataCatalog.remove("scored")


def _scores(evaluator, predictions):
    evaluator.reset()
    evaluator._predictions = copy.deepcopy(predictions)
    return evaluator.evaluate()


def _assert_same(ours, oracle):
    assert set(ours) == set(oracle)
    for task, metrics in oracle.items():
        assert set(ours[task]) == set(metrics)
        for metric, value in metrics.items():
            assert ours[task][metric] == pytest.approx(value, abs=1e-6, nan_ok=True), metric


def test_coco(evaluated, tmp_path):
    name, _, predictions = evaluated
    ours = _scores(FastCOCOEvaluator(name, output_dir=str(tmp_path)), predictions)
    official = COCOEvaluator(name, output_dir=str(tmp_path / "official"), use_fast_impl=False)
    oracle = _scores(official, predictions)
    assert 5 < oracle["bbox"]["AP"] < 95 and 5 < oracle["segm"]["AP"] < 95
    assert any(metric.startswith("AP-") for metric in oracle["bbox"])
    _assert_same(ours, oracle)
    files = [tmp_path / folder / "coco_instances_results.json" for folder in ("", "official")]
    assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


@pytest.mark.parametrize("area", [{}, {"area": 0}])
def test_without_area_and_crowds_and_with_an_id_0(evaluated, tmp_path, area):
    name, coco, predictions = evaluated
    oracle = _scores(COCOEvaluator(name, output_dir=str(tmp_path)), predictions)
    dataset = copy.deepcopy(coco.dataset)
    for number, annotation in enumerate(dataset["annotations"]):
        annotation["id"] = number
        del annotation["area"]
        annotation |= area
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    (tmp_path / "sparse.json").write_text(json.dumps(dataset))
    register_coco_instances("sparse", {}, str(tmp_path / "sparse.json"), "")
    try:
        DatasetCatalog.get("sparse")
        ours = _scores(FastCOCOEvaluator("sparse", output_dir=str(tmp_path)), predictions)
    finally:
        DatasetCatalog.remove("sparse")
        MetadataCatalog.remove("sparse")
    # Areas from masks differ by a pixel or two from those in the file: not in what is found.
    for task in oracle:
        for metric in ("AP", "AP50", "AP75"):
            assert ours[task][metric] == pytest.approx(oracle[task][metric], abs=1e-6)
        sizes = [np.isnan([each[task][f"AP{size}"] for size in "sml"]) for each in (ours, oracle)]
        assert (sizes[0] == sizes[1]).all()


def _process(evaluator, coco, **fields):
    """What an evaluator says of a model that finds nothing."""
    evaluator.reset()
    for image in coco.dataset["images"]:
        instances = Instances((image["height"], image["width"]), **fields)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def test_where_nothing_is_found_there_are_the_metrics_that_there_are_else(evaluated, tmp_path):
    name, coco, predictions = evaluated
    oracle = _scores(COCOEvaluator(name, output_dir=str(tmp_path)), predictions)
    fields = {"pred_boxes": Boxes([]), "scores": torch.zeros(0), "pred_classes": torch.zeros(0)}
    fields["pred_masks"] = torch.zeros(0, 9, 9)
    ours = _process(FastCOCOEvaluator(name), coco, **fields)
    _assert_same(ours, {task: dict.fromkeys(oracle[task], np.nan) for task in oracle})
    with_points = _process(FastCOCOEvaluator(name), coco, pred_keypoints=torch.zeros(0, 17, 3))
    assert with_points.keys() == {"bbox", "keypoints"}


@pytest.fixture
def lvis_like(evaluated, tmp_path):
    """The same annotations as LVIS has them: federated, with frequencies, no crowds."""
    _, coco, predictions = evaluated
    dataset = copy.deepcopy(coco.dataset)
    dataset["annotations"] = [a for a in dataset["annotations"] if not a["iscrowd"]]
    for number, category in enumerate(dataset["categories"]):
        category["frequency"] = "rcff"[number]
    rng = np.random.default_rng(2)
    ids = [category["id"] for category in dataset["categories"]]
    for image in dataset["images"]:
        there = {a["category_id"] for a in dataset["annotations"] if a["image_id"] == image["id"]}
        absent = [i for i in ids if i not in there]
        image["neg_category_ids"] = [i for i in absent if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [i for i in there if rng.random() < 0.3]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(dataset))
    MetadataCatalog.get("lvis_like").set(json_file=str(path), evaluator_type="lvis")
    yield "lvis_like", path, predictions
    MetadataCatalog.remove("lvis_like")


def test_lvis(lvis_like, tmp_path, monkeypatch):
    lvis = pytest.importorskip("lvis", reason="lvis is the oracle: pip install --no-deps lvis")
    name, path, predictions = lvis_like
    ours = _scores(FastLVISEvaluator(name, str(tmp_path)), predictions)

    monkeypatch.setattr(np, "float", float, raising=False)  # gone in NumPy 2
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    for task in ("bbox", "segm"):
        dropped = "bbox" if task == "segm" else "segmentation"
        given = [{k: v for k, v in r.items() if k != dropped} for r in copy.deepcopy(results)]
        truth = lvis.LVIS(str(path))
        oracle = lvis.LVISEval(truth, lvis.LVISResults(truth, given), task)
        oracle.run()
        for metric, value in ours[task].items():
            wanted = oracle.get_results()[metric] * 100
            wanted = float("nan") if wanted < 0 else wanted
            assert value == pytest.approx(wanted, abs=1e-6, nan_ok=True), (task, metric)
    assert 5 < ours["segm"]["AP"] < 95 and ours["bbox"]["APr"] > 0


CATEGORIES = (3, 7)
POINTS = [20, 20, 2, 40, 30, 2, 60, 50, 1] + [0] * 42


@pytest.fixture
def content():
    """Three images with an object of each class; every object of another size."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 200, "width": 300} for i in (1, 2, 3)]
    objects = []
    for image in images:
        for category, left in zip(CATEGORIES, (10, 150), strict=True):
            side = 20 * len(objects) + 24
            right, bottom = left + side, 15 + side
            objects.append(
                {"id": len(objects) + 1, "image_id": image["id"], "category_id": category,
                 "bbox": [left, 15, side, side], "area": side * side, "iscrowd": 0,
                 "segmentation": [[left, 15, right, 15, right, bottom, left, bottom]]}
            )  # fmt: skip
    names = dict(zip(CATEGORIES, ("cat", "dog"), strict=True))
    categories = [{"id": i, "name": name, "frequency": "f"} for i, name in names.items()]
    return {"images": images, "annotations": objects, "categories": categories}


@pytest.fixture
def perfect_scores(tmp_path):
    """Of what is the ground truth, but for masks that are given; and what AP says of it."""

    def perfect_scores(kind, content, given=None, keypoints=False):
        given = copy.deepcopy(given or content)
        (tmp_path / "truth.json").write_text(json.dumps(content))
        mapping = {number: i for i, number in enumerate(CATEGORIES)}
        MetadataCatalog.get("given").set(
            json_file=str(tmp_path / "truth.json"),
            thing_classes=["cat", "dog"],
            thing_dataset_id_to_contiguous_id=mapping,
        )
        per_image = {image["id"]: [] for image in given["images"]}
        for each in given["annotations"]:
            polygons = each["segmentation"]
            rle = (
                mask_util.merge(mask_util.frPyObjects(polygons, 200, 300))
                if polygons
                else mask_util.encode(np.zeros((200, 300), np.uint8, order="F"))
            )
            result = {
                "image_id": each["image_id"], "category_id": mapping[each["category_id"]],
                "bbox": each["bbox"], "score": 0.5 + 0.01 * len(per_image[each["image_id"]]),
                "segmentation": {**rle, "counts": rle["counts"].decode()},
            }  # fmt: skip
            if keypoints:
                result["keypoints"] = each.get("keypoints") or [*POINTS]
                result["score"] -= 0.4 * ("keypoints" not in each)
            per_image[each["image_id"]].append(result)
        predictions = [{"image_id": i, "instances": each} for i, each in per_image.items()]
        try:
            return _scores(kind("given", output_dir=str(tmp_path / "out")), predictions)
        finally:
            MetadataCatalog.remove("given")

    return perfect_scores


def _ids_from_0(content):
    for i, each in enumerate(content["annotations"]):
        each["id"] = i


def _negative_annotations(content):
    for each in content["annotations"]:
        each["id"] *= -1


def _long_ids(content):
    for each in content["annotations"]:
        each["id"] += 9 * 10**17
    for each in content["images"]:
        each["id"] += 9 * 10**17
    for each in content["annotations"]:
        each["image_id"] += 9 * 10**17


def _negative_images(content):
    for each in content["images"]:
        each["id"] *= -1
    for each in content["annotations"]:
        each["image_id"] *= -1


def _float_sizes(content):
    for each in content["images"]:
        each |= {"width": 300.0, "height": 200.0}


def _sparse(content):
    for each in content["annotations"]:
        del each["area"], each["iscrowd"]


def _strange_parts(content):
    content["annotations"][0]["segmentation"].insert(0, [5, 5])
    content["annotations"][1]["segmentation"].insert(0, [5, 5, 90, 90])
    content["annotations"][2]["segmentation"].append([])


@pytest.mark.parametrize(
    "spoil",
    [
        _ids_from_0, _negative_annotations, _long_ids, _negative_images, _float_sizes, _sparse,
        _strange_parts,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [FastCOCOEvaluator, FastLVISEvaluator])
def test_perfect_predictions_score_100(kind, spoil, content, perfect_scores):
    good = copy.deepcopy(content)
    spoil(content)
    if spoil in (_long_ids, _negative_images):
        good = content
    scores = perfect_scores(kind, content, good)
    for task in ("bbox", "segm"):
        for metric in ("AP", "AP50", "APs", "APm", "APl"):
            assert scores[task][metric] == pytest.approx(100), (task, metric)


@pytest.mark.parametrize("kind", [FastCOCOEvaluator, FastLVISEvaluator])
@pytest.mark.parametrize("mask", [None, [], [[]], [[5, 5]], [[5, 5, 90, 90]], "flat"])
@pytest.mark.parametrize("predicted", ["on its box", "empty"])
def test_an_object_without_a_mask_counts_for_boxes_alone(
    kind, mask, predicted, content, perfect_scores
):
    good, first = copy.deepcopy(content), content["annotations"][0]
    left, top, *_ = first["bbox"]
    first["segmentation"] = [[left, top] * 3] if mask == "flat" else mask
    if predicted == "empty":
        good["annotations"][0]["segmentation"] = []
    scores = perfect_scores(kind, content, good)
    assert scores["bbox"]["AP"] == pytest.approx(100)
    assert scores["segm"]["AP"] == pytest.approx(100)
    # Away from its box, it is a false mask.
    good["annotations"][0]["segmentation"] = [[200, 100, 250, 100, 250, 150, 200, 150]]
    scores = perfect_scores(kind, content, good)
    assert scores["bbox"]["AP"] == pytest.approx(100) and scores["segm"]["AP"] < 99


@pytest.mark.parametrize("damage", ["missing", "strange", "one missing"])
def test_lvis_without_frequencies_has_no_ap_of_them(content, perfect_scores, damage):
    for category in content["categories"][: 1 if damage == "one missing" else 2]:
        del category["frequency"]
        if damage == "strange":
            category["frequency"] = "often"
    scores = perfect_scores(FastLVISEvaluator, content)["segm"]
    assert set(scores) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert scores["AP"] == pytest.approx(100)


@pytest.mark.parametrize("spoil", ["nothing", "some without", "empty list", "class without"])
def test_perfect_keypoints_score_100(content, perfect_scores, spoil):
    for each in content["annotations"]:
        each["keypoints"] = [*POINTS]  # without num_keypoints
    if spoil in ("some without", "empty list"):
        content["annotations"][0]["keypoints"] = []
        if spoil == "some without":
            del content["annotations"][0]["keypoints"]
    if spoil == "class without":
        content["annotations"] = content["annotations"][::2]
    scores = perfect_scores(FastCOCOEvaluator, content, keypoints=True)
    assert scores["keypoints"]["AP"] == pytest.approx(100)
    assert scores["bbox"]["AP"] == pytest.approx(100)


def test_keypoints_of_another_number_are_named(content, perfect_scores):
    for each in content["annotations"]:
        each["keypoints"] = POINTS[:9]
    with pytest.raises(InputError, match=r"KEYPOINT_OKS_SIGMAS has 17 values .* have 3 keypoints"):
        perfect_scores(FastCOCOEvaluator, content, keypoints=True)


@pytest.mark.parametrize("kind", [FastCOCOEvaluator, FastLVISEvaluator])
def test_a_function_is_asked_at_every_evaluation(kind, tmp_path):
    box = {"bbox": [10, 10, 50, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": "a.jpg", "image_id": 1, "height": 100, "width": 100}
    DatasetCatalog.register("labels", lambda: [{**image, "annotations": [dict(box)]}])
    style = "lvis" if kind is FastLVISEvaluator else "coco"
    MetadataCatalog.get("labels").set(thing_classes=["cat"], evaluator_type=style)
    found = {"image_id": 1, "category_id": 0, "bbox": [10, 10, 40, 50], "score": 1.0}
    try:
        for wanted, left in ((100, 10), (0, 60), (100, 10)):
            box["bbox"] = [left, 10, left + 40, 60]
            evaluator = kind("labels", output_dir=str(tmp_path))
            scores = _scores(evaluator, [{"image_id": 1, "instances": [found]}])
            assert scores["bbox"]["AP"] == pytest.approx(wanted)
            truth = json.loads((tmp_path / TRUTH_FILE).read_text())
            assert truth["annotations"][0]["bbox"][0] == left
    finally:
        DatasetCatalog.remove("labels")
        MetadataCatalog.remove("labels")

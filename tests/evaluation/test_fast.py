"""Fast evaluation gives the numbers of pycocotools and of lvis."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO

from rope_vit_det.evaluation.fast import FastCOCOEvaluator, FastLVISEvaluator, class_table


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


def test_without_area_and_crowds_and_with_an_id_0(evaluated, tmp_path):
    name, coco, predictions = evaluated
    oracle = _scores(COCOEvaluator(name, output_dir=str(tmp_path)), predictions)
    dataset = copy.deepcopy(coco.dataset)
    for number, annotation in enumerate(dataset["annotations"]):
        annotation["id"] = number
        del annotation["area"]
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


def test_without_predictions(evaluated, tmp_path):
    name, _, predictions = evaluated
    nothing = [{"image_id": image["image_id"], "instances": []} for image in predictions]
    scores = _scores(FastCOCOEvaluator(name, output_dir=str(tmp_path)), nothing)
    assert np.isnan(scores["bbox"]["AP"])


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


def test_the_table_of_classes_skips_what_is_not_defined():
    precision = np.full((2, 3, 2, 1, 1), -1.0)
    precision[:, :, 1] = 0.5
    table = class_table(["cat", "dog"], precision)
    words = [word.strip() for word in table.splitlines()[2].split("|")]
    assert words[1:5] == ["cat", "nan", "dog", "50.000"]

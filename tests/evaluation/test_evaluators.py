"""The evaluator follows the dataset's evaluator_type."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.evaluators import EVALUATORS, build_evaluator, results_folder


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [("voc_2007_val", PascalVOCDetectionEvaluator), ("ade20k_sem_seg_val", SemSegEvaluator)],
)
def test_builtin_datasets(detector_cfg, dataset, kind, tmp_path, monkeypatch):
    metadata = MetadataCatalog.get(dataset)
    if kind is SemSegEvaluator:
        # Its constructor asks the dataset for its files.
        monkeypatch.setattr(
            "detectron2.evaluation.sem_seg_evaluation.DatasetCatalog.get", lambda n: []
        )
    else:
        (tmp_path / "Annotations").mkdir()
    assert metadata.evaluator_type
    assert type(build_evaluator(detector_cfg, dataset, str(tmp_path))) is kind


def test_coco(detector_cfg, small_demo_dataset, tmp_path):
    from detectron2.data.datasets import register_coco_instances

    json_file = small_demo_dataset / "annotations" / "instances_val.json"
    register_coco_instances("evaluated", {}, str(json_file), str(small_demo_dataset / "val"))
    try:
        evaluator = build_evaluator(detector_cfg, "evaluated", str(tmp_path))
        assert isinstance(evaluator, COCOEvaluator)
    finally:
        DatasetCatalog.remove("evaluated")
        MetadataCatalog.remove("evaluated")


def test_cityscapes_panoptic(detector_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("numpy.__version__", "2.2.0")  # the newest that its scripts run on
    name = "cityscapes_fine_panoptic_val"  # of Detectron2's projects/Panoptic-DeepLab
    parts = build_evaluator(detector_cfg, name, str(tmp_path))._evaluators
    wanted = {COCOPanopticEvaluator, CityscapesSemSegEvaluator, CityscapesInstanceEvaluator}
    assert {type(part) for part in parts} == wanted


@pytest.mark.parametrize("has_labels", [False, True])
def test_both_forms_of_coco_panoptic(detector_cfg, small_demo_dataset, tmp_path, has_labels):
    image = next((small_demo_dataset / "val").glob("*.jpg"))
    image.with_suffix(".png").touch()
    segments = [{"id": 1, "category_id": 9, "iscrowd": 0, "area": 9, "bbox": [0, 0, 3, 3]}]
    annotation = {"image_id": 1, "file_name": f"{image.stem}.png", "segments_info": segments}
    panoptic = tmp_path / "panoptic.json"
    panoptic.write_text(json.dumps({"annotations": [annotation]}))
    instances = small_demo_dataset / "annotations" / "instances_val.json"
    numbers = {
        each["id"]: i for i, each in enumerate(json.loads(instances.read_text())["categories"])
    }
    classes = [*map(str, numbers), "grass"]  # as in coco_2017_val_panoptic
    metadata = {
        **{"thing_classes": classes, "thing_dataset_id_to_contiguous_id": numbers},
        **{"stuff_classes": classes, "stuff_dataset_id_to_contiguous_id": {9: len(numbers)}},
    }
    folder = str(small_demo_dataset / "val")
    register_coco_panoptic("both", metadata, folder, folder, str(panoptic), str(instances))
    load = DatasetCatalog.pop("both")
    more = {"sem_seg_file_name": str(image.with_suffix(".png"))} if has_labels else {}
    DatasetCatalog.register("both", lambda: [record | more for record in load()])
    try:
        parts = build_evaluator(detector_cfg, "both", str(tmp_path / "out"))._evaluators
        kinds = [SemSegEvaluator, COCOEvaluator] if has_labels else []
        pairs = zip(parts, [*kinds, COCOPanopticEvaluator], strict=True)
        assert all(isinstance(part, kind) for part, kind in pairs)
    finally:
        DatasetCatalog.remove("both")
        MetadataCatalog.remove("both")


def test_an_unknown_type_names_the_known_ones(detector_cfg):
    MetadataCatalog.get("oddities").evaluator_type = "taste"
    with pytest.raises(InputError, match=r"'oddities' has evaluator_type 'taste'.*coco"):
        build_evaluator(detector_cfg, "oddities")
    MetadataCatalog.remove("oddities")


def test_what_makes_no_evaluator_is_one_line(detector_cfg, monkeypatch):
    monkeypatch.setattr(EVALUATORS, "_obj_map", {"nothing": lambda cfg, name, folder: None})
    MetadataCatalog.get("nothings").evaluator_type = "nothing"
    with pytest.raises(InputError, match=r"'nothing' of dataset 'nothings' gives None; register"):
        build_evaluator(detector_cfg, "nothings")
    MetadataCatalog.remove("nothings")


def test_of_several_test_sets_each_has_a_folder(detector_cfg):
    detector_cfg.OUTPUT_DIR, detector_cfg.DATASETS.TEST = "out", ("one",)
    assert results_folder(detector_cfg, "one") == "out/inference"
    detector_cfg.DATASETS.TEST = ("one", "far/two")
    assert results_folder(detector_cfg, "one") == "out/inference/one"
    assert results_folder(detector_cfg, "far/two") == "out/inference/far_two"

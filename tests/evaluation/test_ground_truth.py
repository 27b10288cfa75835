"""Ground truth scores 100 against itself, and what an evaluator cannot find is named."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes, load_coco_json, register_coco_instances
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    pascal_voc_evaluation,
)

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation import EVALUATORS
from rope_vit_det.evaluation.evaluators import build_evaluator, read_labels
from rope_vit_det.evaluation.fast import FastCOCOEvaluator
from rope_vit_det.evaluation.ground_truth import score_ground_truth

POINTS = [20, 20, 2, 40, 30, 2, 60, 50, 1]


@pytest.fixture
def score(detector_cfg, tmp_path):
    """Registers what it is given as "truth", and scores it."""

    def score(register, *, fields=None, limit=100, kind=None):
        register()
        if kind:
            MetadataCatalog.get("truth").evaluator_type = kind
        detector_cfg.TEST.DETECTIONS_PER_IMAGE = limit
        evaluator = build_evaluator(detector_cfg, "truth", str(tmp_path / "out"))
        return score_ground_truth("truth", evaluator, detections_per_image=limit, fields=fields)

    yield score
    DatasetCatalog.pop("truth", None)
    MetadataCatalog.pop("truth", None)


@pytest.fixture
def coco(tmp_path):
    """Three images with two objects of two classes each, to be changed; and how to register it."""

    def objects(image):
        for category, left in ((3, 10), (7, 80)):
            right = left + 60
            polygon = [left, 15, right, 15, right, 60, left, 60]
            yield {
                "id": 2 * image + (category == 7), "image_id": image, "category_id": category,
                "bbox": [left, 15, 60, 45], "segmentation": [polygon], "area": 2700, "iscrowd": 0,
            }  # fmt: skip

    images = [{"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 160} for i in (1, 2, 3)]
    content = {
        "images": images,
        "annotations": [each for image in (1, 2, 3) for each in objects(image)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }

    def register():
        (tmp_path / "truth.json").write_text(json.dumps(content))
        register_coco_instances("truth", {}, str(tmp_path / "truth.json"), "")

    return SimpleNamespace(content=content, objects=content["annotations"], register=register)


def test_coco(score, coco):
    coco.objects[0] |= {"iscrowd": 1}
    answer = score(coco.register)
    assert {task: round(each["AP"], 6) for task, each in answer.results.items()} == {
        "bbox": 100, "segm": 100,
    }  # fmt: skip
    assert answer[1:] == ([], [], True)


class _WithCounts(FastCOCOEvaluator):
    """As users write them: it looks at what the model found, before COCO's evaluator does."""

    def process(self, inputs, outputs):
        for each in outputs:
            found = each["instances"].to("cpu")
            self.seen.append((len(found.pred_boxes), found.pred_classes.tolist(), *found.scores))
        super().process(inputs, outputs)


def test_a_users_subclass_of_cocos_evaluator_is_given_instances(score, coco, monkeypatch):
    def counting(cfg, dataset_name, output_folder):
        evaluator = _WithCounts(dataset_name, output_dir=output_folder)
        evaluator.seen = []
        made.append(evaluator)
        return evaluator

    made = []
    monkeypatch.setattr(EVALUATORS, "_obj_map", {**dict(EVALUATORS), "counting": counting})
    # Detectron2 asserts that a file in COCO's format is of its own type.
    register = coco.register

    def registered():
        register()
        MetadataCatalog.get("truth").__dict__["evaluator_type"] = "counting"

    answer = score(registered)
    assert {task: round(each["AP"], 6) for task, each in answer.results.items()} == {
        "bbox": 100, "segm": 100,
    }  # fmt: skip
    assert made[0].seen == [(2, [0, 1], 1.0, 1.0)] * 3


def test_an_empty_box_is_missed_but_its_mask_found(score, coco):
    coco.objects[3]["bbox"][2] = 0
    answer = score(coco.register)
    assert 0 < answer.results["bbox"]["AP"] < 99 and round(answer.results["segm"]["AP"], 6) == 100
    assert answer.missed == ["2.jpg: image 2, annotation 5, box [80, 15, 0, 45]: not found by bbox"]
    boxes = score_again(score, coco, {"pred_boxes"})
    assert set(boxes.results) == {"bbox"}


@pytest.mark.parametrize("mask", [[[5, 5]], [[]], [[5, 5, 9, 9]], [[10, 15] * 3]])
def test_an_object_without_a_mask_is_found_by_its_box(score, coco, mask):
    coco.objects[3]["segmentation"] = mask
    answer = score(coco.register)
    assert {task: round(each["AP"], 6) for task, each in answer.results.items()} == {
        "bbox": 100, "segm": 100,
    }  # fmt: skip
    assert answer[1:] == ([], [], True)


def score_again(score, coco, fields):
    DatasetCatalog.remove("truth")
    return score(lambda: register_again(coco), fields=fields)


def register_again(coco):
    MetadataCatalog.remove("truth")
    coco.register()


def test_what_is_all_empty_or_cannot_be_digested_ends_the_run(score, coco):
    for each in coco.objects:
        each["bbox"][2] = 0
    with pytest.raises(InputError, match=r"'truth'.* has bbox 0: no object is found"):
        score(coco.register)
    for each in coco.objects:
        each["bbox"] = ["a", 1, 1, 1]
    DatasetCatalog.remove("truth")
    with pytest.raises(InputError, match=r"'truth': its evaluator fails") as error:
        score(lambda: register_again(coco))
    assert "\n" not in str(error.value) and error.value.__cause__ is not None


def test_nothing_to_find_is_a_note(score, coco):
    coco.objects.clear()
    answer = score(coco.register)
    assert answer.results == {} and "nothing to find" in answer.notes[0] and answer.known


@pytest.mark.parametrize("limit", [1, 150])
def test_limits_are_named_with_the_ap_that_they_cap(score, coco, limit):
    coco.objects.extend(
        coco.objects[0] | {"id": 100 + i, "bbox": [i, 15, 60, 45]} for i in range(120)
    )
    answer = score(coco.register, limit=limit, fields={"pred_boxes"})
    if limit == 1:
        assert "TEST.DETECTIONS_PER_IMAGE 1; what can be reached is bbox" in answer.notes[0]
        assert "123 objects on 3 images" in answer.notes[0] and not answer.missed
    else:
        assert answer.results["bbox"]["maxDets"] == 150
        assert round(answer.results["bbox"]["AP"], 6) == 100 and not answer.notes


@pytest.mark.parametrize("sigmas", [(), (0.05, 0.05, 0.05)])
def test_keypoints(score, coco, detector_cfg, sigmas):
    for each in coco.objects:
        each["keypoints"] = list(POINTS)
    coco.objects[0]["keypoints"] = [0] * 9
    coco.content["images"].append(coco.content["images"][0] | {"id": 4, "file_name": "empty.jpg"})
    detector_cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
    if not sigmas:
        with pytest.raises(InputError, match=r"TEST\.KEYPOINT_OKS_SIGMAS has 17.* 3 keypoints"):
            score(coco.register)
        return
    answer = score(coco.register)
    assert round(answer.results["keypoints"]["AP"], 6) == 100 and not answer.missed
    assert round(answer.results["bbox"]["AP"], 6) == 100


def test_lvis(score, coco, tmp_path):
    for number, category in enumerate(coco.content["categories"], start=1):
        for each in coco.objects:
            each["category_id"] = (
                number if each["category_id"] == category["id"] else each["category_id"]
            )
        category |= {"id": number, "frequency": "f"}
    for image in coco.content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for each in coco.objects:
        del each["iscrowd"]
    coco.objects[2]["bbox"][3] = 0
    path = str(tmp_path / "truth.json")

    def register():
        (tmp_path / "truth.json").write_text(json.dumps(coco.content))
        DatasetCatalog.register("truth", lambda: load_coco_json(path, "", "truth"))
        MetadataCatalog.get("truth").json_file = path

    answer = score(register, kind="lvis")
    assert answer.results["bbox"]["AP"] < 99 and round(answer.results["segm"]["AP"], 6) == 100
    assert len(answer.missed) == 1 and "image 2, annotation 4" in answer.missed[0]


def test_pascal_voc(score, tmp_path):
    box = "<xmin>20</xmin><ymin>30</ymin><xmax>{}</xmax><ymax>70</ymax>"
    for name, rights in (("a", (80,)), ("b", (80, 10))):
        objects = "".join(
            "<object><name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0"
            f"</difficult><bndbox>{box.format(right)}</bndbox></object>"
            for right in rights
        )
        size = "<size><width>160</width><height>96</height></size>"
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        xml = f"<annotation>{size}{objects}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\nb\n")

    def register(classes=("dog",)):
        register_pascal_voc("truth", str(tmp_path), "val", 2012, classes)

    answer = score(register, kind="pascal_voc")
    assert 0 < answer.results["bbox"]["AP"] < 99
    assert len(answer.missed) == 1 and "image b, annotation 2" in answer.missed[0]
    DatasetCatalog.remove("truth")
    MetadataCatalog.remove("truth")
    (tmp_path / "Annotations" / "b.xml").write_text(
        (tmp_path / "Annotations" / "a.xml").read_text()
    )
    pascal_voc_evaluation.parse_rec.cache_clear()
    answer = score(lambda: register(("dog", "cat")), kind="pascal_voc")
    assert answer.results["bbox"]["AP"] == pytest.approx(50) and not answer.missed
    assert "1 of 2 classes have no object" in answer.notes[0]


@pytest.mark.parametrize("strange", [None, 7])
def test_semantic_segmentation(score, tmp_path, strange):
    labels = np.zeros((40, 60), np.uint8)
    labels[10:20], labels[30:] = 1, 255
    if strange:
        labels[:5] = strange
    cv2.imwrite(str(tmp_path / "a.png"), labels)

    def register():
        record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}
        DatasetCatalog.register("truth", lambda: [record])
        MetadataCatalog.get("truth").set(stuff_classes=["sky", "sea", "wood"], ignore_label=255)

    answer = score(register, kind="sem_seg")
    if strange:
        assert len(answer.missed) == 1 and "300 pixels" in answer.missed[0]
        assert "such as 7" in answer.missed[0]
    else:
        assert answer.results["sem_seg"]["mIoU"] == 100 and not answer.missed


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_panoptic(score, tmp_path, is_spoiled):
    pytest.importorskip("panopticapi", reason="it is on GitHub alone: cocodataset/panopticapi")
    labels = np.zeros((40, 60, 3), np.uint8)
    labels[10:20, :, 2], labels[30:, :, 2] = 1, 2  # red, as OpenCV writes it
    cv2.imwrite(str(tmp_path / "a.png"), labels)
    segments = [
        {"id": number, "category_id": number, "iscrowd": 0, "area": 600, "bbox": [0, 0, 1, 1]}
        for number in (1, 2, *([3] if is_spoiled else []))
    ]
    content = {
        "images": [{"id": 4}],
        "annotations": [{"image_id": 4, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": i, "name": f"c{i}", "isthing": int(i == 1)} for i in (1, 2, 3)],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))

    def evaluate():
        name = "truth"
        MetadataCatalog.get(name).set(
            panoptic_json=str(tmp_path / "panoptic.json"),
            panoptic_root=str(tmp_path),
            thing_dataset_id_to_contiguous_id={1: 0},
            stuff_dataset_id_to_contiguous_id={2: 0, 3: 1},
        )
        DatasetCatalog.register(name, lambda: [{"file_name": "a.jpg", "image_id": 4}])
        evaluator = COCOPanopticEvaluator(name, str(tmp_path / "out"))
        return score_ground_truth(name, evaluator, detections_per_image=100)

    answer = evaluate()
    if is_spoiled:
        assert answer.results["panoptic_seg"]["PQ"] < 99
        assert answer.missed == ["a.jpg: image 4, annotation 3: a.png has no pixel of this segment"]
    else:
        assert answer.results["panoptic_seg"]["PQ"] == 100 and not answer.missed


def test_a_part_with_nothing_to_find_is_left_out(tmp_path):
    """As in Cityscapes' panoptic dicts, which have no objects."""
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.eye(16, dtype=np.uint8))
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(path), "height": 16, "width": 16}
    DatasetCatalog.register("truth", lambda: [record])
    try:
        MetadataCatalog.get("truth").set(stuff_classes=["sky", "grass"], ignore_label=255)
        labels = SemSegEvaluator("truth", sem_seg_loading_fn=read_labels)
        both = DatasetEvaluators([labels, CityscapesInstanceEvaluator("truth")])
        answer = score_ground_truth("truth", both, detections_per_image=100)
    finally:
        DatasetCatalog.pop("truth", None)
        MetadataCatalog.pop("truth", None)
    assert answer.results.keys() == {"sem_seg"} and answer.results["sem_seg"]["mIoU"] == 100


@pytest.mark.parametrize("is_spoiled", [False, True])
@pytest.mark.parametrize("kind", ["cityscapes_instance", "cityscapes_sem_seg"])
def test_cityscapes(score, tmp_path, kind, is_spoiled):
    pytest.importorskip("cityscapesscripts", reason="pip install cityscapesscripts")
    if np.lib.NumpyVersion(np.__version__) >= "2.3.0":
        pytest.skip("cityscapesScripts 2.3.0 does not run on it: pip install 'numpy<2.3'")
    images, truth = tmp_path / "leftImg8bit", tmp_path / "gtFine"
    for folder in (images, truth):
        (folder / "town").mkdir(parents=True)
    cv2.imwrite(str(images / "town/town_0_1_leftImg8bit.png"), np.zeros((96, 160, 3), np.uint8))
    boxes = [(20, 10, 50, 80), (80, 20, 150, 80)]
    polygons = [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]] for x1, y1, x2, y2 in boxes]
    objects = [{"label": "car", "polygon": polygon} for polygon in polygons]
    content = {"imgHeight": 96, "imgWidth": 160, "objects": objects}
    (truth / "town/town_0_1_gtFine_polygons.json").write_text(json.dumps(content))
    labels_of = {"labelIds": (7, 26), "labelTrainIds": (0, 13), "instanceIds": (7, 26000)}
    for name, (road, car) in labels_of.items():
        labels = np.full((96, 160), road, np.uint16 if car > 255 else np.uint8)
        for number, (left, top, right, bottom) in enumerate(boxes):
            if not (is_spoiled and number == 0 and name != "labelIds"):
                labels[top : bottom + 1, left : right + 1] = car + number * (car > 255)
        cv2.imwrite(str(truth / f"town/town_0_1_gtFine_{name}.png"), labels)

    def register():
        load = cityscapes.load_cityscapes_instances
        if kind == "cityscapes_sem_seg":
            load = cityscapes.load_cityscapes_semantic
        DatasetCatalog.register("truth", lambda: load(str(images), str(truth)))
        classes = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
        MetadataCatalog.get("truth").set(
            thing_classes=classes,
            stuff_classes=list(range(19)),
            gt_dir=str(truth),
            ignore_label=255,
        )

    answer = score(register, kind=kind)
    found = next(iter(answer.results.values()))
    if is_spoiled:
        assert len(answer.missed) == 1 and "town_0_1_leftImg8bit.png" in answer.missed[0]
    else:
        assert found.get("AP", found.get("IoU")) == pytest.approx(100) and not answer.missed


class _Counting(DatasetEvaluator):
    def reset(self):
        self.seen = 0

    def process(self, inputs, outputs):
        self.seen += sum(output["count"] for output in outputs)

    def evaluate(self):
        return {"count": {"total": self.seen}}


@pytest.mark.parametrize("is_known", [True, False])
def test_a_users_evaluator(score, monkeypatch, is_known):
    def counting(cfg, dataset_name, output_folder):
        return _Counting()

    if is_known:
        counting.perfect_output = lambda record: {"count": record["wanted"]}
    monkeypatch.setattr(EVALUATORS, "_obj_map", {**dict(EVALUATORS), "counting": counting})
    records = [{"wanted": 3}, {"wanted": 4}]
    answer = score(lambda: DatasetCatalog.register("truth", lambda: records), kind="counting")
    assert answer.known is is_known
    assert answer.results == ({"count": {"total": 7}} if is_known else {})

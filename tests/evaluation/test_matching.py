"""What is found, false and missed, and AP by class, on detections that are known."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.matching import confusion_matrix, match_images
from rope_vit_det.evaluation.precision import METRICS, class_precisions
from rope_vit_det.evaluation.results import find_task, read_results, read_truth, restrict

ONE_RESULT = '[{"image_id": %d, "category_id": %d, "score": 1, "bbox": [0, 0, 1, 1]}]'
OPTIONS = {"min_score": 0.5, "iou": 0.5, "task": "segm"}


@pytest.fixture
def truth(known_results) -> COCO:
    return read_truth(known_results.json_file)


@pytest.fixture
def results(known_results, truth):
    return read_results(known_results.results_file, truth)[0]


def test_matches_are_those_that_were_planned(known_results, truth, results):
    matches = match_images(truth, results, **OPTIONS)
    counts = {m.image["id"]: (len(m.found), len(m.false), len(m.missed)) for m in matches}
    assert counts == known_results.counts
    shares = [each.f1 for each in matches]
    assert shares == sorted(shares) and shares[0] < 1
    assert known_results.missed["id"] in {a["id"] for each in matches for a in each.missed}


def test_confusion_counts_what_was_planned(known_results, truth, results):
    counts = confusion_matrix(truth, results, **OPTIONS)
    names = sorted(truth.cats)
    wrong = counts[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    (row, column) = np.argwhere(wrong)[0]
    assert wrong.sum() == 1 and (names[row], names[column]) == known_results.confused
    assert counts[-1].sum() == 1 and counts[:, -1].sum() == 1
    objects = sum(not each["iscrowd"] for each in truth.dataset["annotations"])
    assert counts[:-1].sum() == objects


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_class_precisions_equal_pycocotools(truth, results, task):
    whole, *classes = class_precisions(truth, results, task)
    assert [each.name for each in classes] == [truth.cats[i]["name"] for i in sorted(truth.cats)]
    ids = sorted(truth.cats)
    for ours, chosen in zip([whole, *classes], [ids, *([i] for i in ids)], strict=True):
        with redirect_stdout(io.StringIO()):
            copies = copy.deepcopy(results)
            for each in copies if task == "segm" else ():
                del each["bbox"]
            oracle = COCOeval(truth, truth.loadRes(copies), task)
            oracle.params.catIds = chosen
            oracle.evaluate()
            oracle.accumulate()
            oracle.summarize()
        stats = np.where(oracle.stats[:6] < 0, np.nan, oracle.stats[:6] * 100)
        np.testing.assert_allclose([ours.values[key] for key in METRICS], stats, atol=1e-6)
    assert whole.num_objects == sum(each.num_objects for each in classes)


def test_results_of_the_prediction_tool_are_matched_by_file_name(truth, results, tmp_path):
    image = truth.dataset["images"][1]
    own = [{**each, "image_id": 9} for each in results if each["image_id"] == image["id"]]
    file = tmp_path / "found.json"
    entry = {"id": 9, "file_name": f"/photos/{image['file_name']}"}
    file.write_text(json.dumps({"images": [entry], "annotations": own, "categories": []}))
    read, covered = read_results(file, truth)
    assert covered == {image["id"]} and {each["image_id"] for each in read} == covered
    assert find_task(read, truth) == "segm"
    assert set(restrict(truth, covered).imgs) == covered


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not a JSON file"),
        ("{}", "is neither a list of COCO results"),
        ('[{"image_id": 1}]', "is neither a list of COCO results"),
        ('[{"image_id": [1], "category_id": 1, "score": 1, "bbox": []}]', "is neither a list"),
        ('{"images": [], "annotations": [7]}', "is neither a list of COCO results"),
        ('{"images": ["x.jpg"], "annotations": []}', "an image is no object with an id: 'x.jpg'"),
        (ONE_RESULT % (999, 1), "another dataset.*image_id 999"),
        (ONE_RESULT % (1, 9), "another dataset.*category_id 9"),
        ('{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}', "other images: x.jpg"),
    ],
)
def test_results_of_other_data_are_refused(truth, tmp_path, content, message):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_results(file, truth)
    assert "\n" not in str(error.value)


def test_an_empty_dataset_is_refused(tmp_path):
    file = tmp_path / "empty.json"
    file.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match=r"empty\.json is an empty dataset"):
        read_truth(file)


def test_ids_and_masks_of_other_peoples_files_are_matched(known_results, tmp_path):
    """As well as those of a good file, but for the object whose mask is gone."""
    content = json.loads(known_results.json_file.read_text())
    found = json.loads(known_results.results_file.read_text())
    for each in content["images"]:
        each |= {"id": -each["id"], "width": float(each["width"])}
    for i, each in enumerate(content["annotations"]):
        each |= {"id": 9 * 10**17 + i, "image_id": -each["image_id"]}
    for each in found:
        each["image_id"] *= -1
    number = min(known_results.counts, key=lambda i: known_results.counts[i][1:])
    spoilt = next(
        a for a in content["annotations"] if a["image_id"] == -number and not a["iscrowd"]
    )
    spoilt["segmentation"] = [[5, 5]]
    empty = {"size": [2, 2], "counts": "4"}
    found.append({**found[0], "segmentation": empty, "image_id": -number})
    for name, value in (("truth", content), ("found", found)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    truth = read_truth(tmp_path / "truth.json")
    results, _ = read_results(tmp_path / "found.json", truth)
    assert find_task(results, truth) == "segm"
    matches = match_images(truth, results, **OPTIONS)
    counts = {-m.image["id"]: (len(m.found), len(m.false), len(m.missed)) for m in matches}
    good = known_results.counts
    assert counts == good | {number: (good[number][0] - 1, *good[number][1:])}
    assert confusion_matrix(truth, results, **OPTIONS)[:-1].sum() == sum(
        not each["iscrowd"] and each is not spoilt for each in content["annotations"]
    )
    by_box = match_images(truth, results[:-1], **OPTIONS | {"task": "bbox"})
    assert sum(len(each.found) for each in by_box) == sum(each[0] for each in good.values())

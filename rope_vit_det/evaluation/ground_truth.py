"""A dataset's ground truth, scored against itself by the evaluator that a run will use.

What an evaluator cannot digest, or cannot find, would cost a training at its first evaluation.
"""

import json
import os
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager

from ..data.coco_file import clean_mask, clean_records, complete_coco, to_rle
from ..errors import InputError
from .evaluators import EVALUATORS, read_labels
from .fast import FastLVISEvaluator, as_api
from .matching import match_images

_PERFECT = 100 - 1e-6
_MIN_IOU = 0.95  # the strictest threshold of COCO's AP
_MAX_KEYPOINT_DETECTIONS = 20  # of an image, in COCO's keypoint AP
# The metric of a task that is 100 where all is found.
_SCORES = ("AP", "mIoU", "IoU", "PQ")


class GroundTruthScore(NamedTuple):
    """What an evaluator says of a dataset's own ground truth.

    Attributes:
        results: as it returned them, {task: {metric: value}}.
        missed: a line for each object that it does not find: file, image, annotation.
        notes: lines on what was left out, and on what keeps the scores below 100.
        known: False: nothing was scored, as no output can be made from this dataset's dicts.
    """

    results: dict[str, dict[str, float]]
    missed: list[str]
    notes: list[str]
    known: bool = True


def score_ground_truth(
    dataset_name: str,
    evaluator: DatasetEvaluator,
    *,
    detections_per_image: int,
    fields: Collection[str] | None = None,
) -> GroundTruthScore:
    """Puts the ground truth through an evaluator, as predictions.

    Crowds give no prediction, objects without labelled keypoints none of keypoints.

    Args:
        evaluator: of this dataset; its state is lost.
        detections_per_image: TEST.DETECTIONS_PER_IMAGE, below 0: without limit.
        fields: of the `Instances` that the model puts out, such as "pred_masks"; none: proposals.
            None: all that the data has.

    Raises:
        InputError: the evaluator fails on it, or finds nothing.
    """
    try:
        with np.errstate(all="ignore"):
            limit = detections_per_image if detections_per_image >= 0 else None
            return _score(dataset_name, evaluator, limit, fields)
    except InputError:
        raise
    except Exception as error:  # of whoever wrote the dataset or the evaluator
        code = traceback.extract_tb(error.__traceback__)[-1].line
        reason = " ".join(str(error).split()) or code
        raise InputError(
            f"dataset {dataset_name!r}: its evaluator fails on its ground truth: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _score(
    name: str, evaluator: DatasetEvaluator, limit: int | None, fields: Collection[str] | None
) -> GroundTruthScore:
    make = dict(EVALUATORS).get(MetadataCatalog.get(name).get("evaluator_type", None))
    output = getattr(make, "perfect_output", None)
    records = clean_records(DatasetCatalog.get(name))
    formats: list[_Format] = []
    if output is None:
        for part in getattr(evaluator, "_evaluators", [evaluator]):
            kind = next((each for each in _FORMATS if isinstance(part, each)), None)
            if kind is None:
                note = f"dataset {name!r}: no outputs are known for {type(part).__name__}"
                return GroundTruthScore({}, [], [f"{note}; not scored"], known=False)
            formats.append(_FORMATS[kind](name, part, records, fields, limit))
        if not any(each.is_scored for each in formats):
            note = f"dataset {name!r} has nothing to find, or its proposals have no AP; not scored"
            return GroundTruthScore({}, [], [note])
        # Cityscapes' panoptic dicts, for one, have no objects for the evaluator of instances.
        formats = [each for each in formats if each.is_scored]
        evaluator = DatasetEvaluators([each.evaluator for each in formats])

        def output(record: dict) -> dict[str, Any]:
            return {k: v for each in formats for k, v in each.output(record).items()}

    evaluator.reset()
    for record in records:
        evaluator.process([record], [output(record)])
        for each in formats:
            each.complete(record)
    results = evaluator.evaluate() or {}
    scores = {
        task: metrics[key]
        for task, metrics in results.items()
        for key in _SCORES
        if key in getattr(metrics, "keys", tuple)()
    }
    for task, score in scores.items():
        if not score > 0:  # or NaN
            raise InputError(
                f"dataset {name!r}: scored against itself by its evaluator, its ground truth has "
                f"{task} {score:.3g}: no object is found"
            )
    low = {task: score for task, score in scores.items() if score < _PERFECT}
    missed = [line for each in formats for line in each.missed(low)]
    notes = [f"dataset {name!r}: {line}" for each in formats for line in each.notes(low)]
    if low and not missed and not notes:
        notes = [f"dataset {name!r}: its own ground truth scores {_describe(low)}"]
    return GroundTruthScore(results, missed, notes)


@dataclass
class _Format:
    """The outputs of a perfect model for one evaluator, and what that evaluator misses of them."""

    name: str  # of the dataset
    evaluator: Any
    records: list[dict]
    fields: Collection[str] | None
    limit: int | None  # detections of an image
    is_scored: bool = True
    strange: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Finds out what the outputs are made of, and whether there is anything to find."""

    def output(self, record: dict) -> dict[str, Any]:
        raise NotImplementedError

    def complete(self, record: dict) -> None:
        """After the evaluator has processed an output."""

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        """Lines on the objects that were not found, where the scores of these tasks are low."""
        yield from self.strange

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        yield from ()

    def _predicts(self, field: str) -> bool:
        return self.fields is None or field in self.fields


class _Instances(_Format):
    def __post_init__(self) -> None:
        self.is_scored = bool(self.objects()) and self._predicts("pred_boxes")
        has_masks = any("segmentation" in each for each in self.objects())
        self.has_masks = self._predicts("pred_masks") and has_masks

    def objects(self) -> list[dict]:
        """All that are to be found in the dataset."""
        return [each for record in self.records for each in _objects(record)]

    def output(self, record: dict) -> dict[str, Any]:
        instances = self._boxes(record)
        if self.has_masks:
            instances.pred_masks = _masks(record)[: self.limit]
        return {"instances": instances}

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        counts = Counter({i: len(_objects(record)) for i, record in enumerate(self.records)})
        yield from _limit_note("TEST.DETECTIONS_PER_IMAGE", self.limit, counts, low)

    def _boxes(self, record: dict) -> Instances:
        objects = _objects(record)[: self.limit]
        instances = Instances((record.get("height", 0), record.get("width", 0)))
        boxes = [
            BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in objects
        ]
        instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.as_tensor([each["category_id"] for each in objects]).long()
        instances.scores = torch.ones(len(objects))
        return instances


class _COCO(_Instances):
    """LVIS's too. Its results are made of annotations: pixels of masks would take most of the time.

    They are also of objects that Detectron2, when it reads the file, leaves out for their masks.
    """

    def __post_init__(self) -> None:
        self.is_lvis = isinstance(self.evaluator, FastLVISEvaluator)
        self.truth = complete_coco(self.evaluator._coco_api.dataset, f"dataset {self.name!r}")
        self.sizes = {each["id"]: (each["height"], each["width"]) for each in self.truth["images"]}
        super().__post_init__()
        self.is_scored = self.is_scored and self.evaluator._do_evaluation
        mapping = MetadataCatalog.get(self.name).get("thing_dataset_id_to_contiguous_id", None)
        order = sorted(each["id"] for each in self.truth["categories"])
        self.numbers = mapping or {number: i for i, number in enumerate(order)}
        points = next((each["keypoints"] for each in self.objects() if _is_labelled(each)), ())
        self.num_points = self._predicts("pred_keypoints") * len(points) // 3
        self.results: dict[Any, list[dict]] = {image: [] for image in self.sizes}
        for each in self.objects() if self.is_scored else ():
            self.results[each["image_id"]].append(self._result(each))

    def objects(self) -> list[dict]:
        return _objects(self.truth)

    def output(self, record: dict) -> dict[str, Any]:
        """Without masks; for a user's evaluator, which may look at more than COCO's results."""
        instances = self._boxes(record)
        if self.num_points:
            points = torch.tensor([each["keypoints"] for each in _objects(record)[: self.limit]])
            instances.pred_keypoints = points.float().reshape(-1, self.num_points, 3)
        return {"instances": instances}

    def complete(self, record: dict) -> None:
        image = record["image_id"]
        results = self.results[image][: self.limit]
        found = [{**each, "category_id": self.numbers[each["category_id"]]} for each in results]
        self.evaluator._predictions[-1:] = [{"image_id": image, "instances": found}]

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        found = [each for results in self.results.values() for each in results]
        files = {record["image_id"]: record["file_name"] for record in self.records}
        lines: dict[str, list[str]] = {}
        truth, sigmas = as_api(self.truth), self.evaluator._kpt_oks_sigmas
        options: dict[str, Any] = {"min_score": 0, "iou": _MIN_IOU, "keypoint_sigmas": sigmas}
        for task in low:
            for match in match_images(truth, found, task=task, **options):
                image = match.image["id"]
                for each in match.missed:
                    place = f"{files.get(image)}: image {image}, annotation {each['id']}"
                    lines.setdefault(f"{place}, box {each['bbox']}", []).append(task)
        yield from (f"{place}: not found by {', '.join(lines[place])}" for place in lines)

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        counts: Counter[Any] = Counter()
        labelled: Counter[Any] = Counter()
        for each in self.objects():
            key = (each["image_id"], None if self.is_lvis else each["category_id"])
            counts[key] += 1
            labelled[key] += _is_labelled(each)
        images = Counter({image: len(results) for image, results in self.results.items()})
        yield from _limit_note("TEST.DETECTIONS_PER_IMAGE", self.limit, images, low)
        limit, what = self.evaluator._max_dets_per_image[-1], "image and class"
        what = "image" if self.is_lvis else what
        boxes = {task: score for task, score in low.items() if task != "keypoints"}
        yield from _limit_note(f"the evaluator's detections of an {what},", limit, counts, boxes)
        points = {task: score for task, score in low.items() if task == "keypoints"}
        what = "COCO's keypoint detections of an image and class,"
        yield from _limit_note(what, _MAX_KEYPOINT_DETECTIONS, labelled, points)

    def _result(self, annotation: dict) -> dict[str, Any]:
        result = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        result["score"] = 1.0
        if self.has_masks:
            rle = _rle(annotation, *self.sizes[annotation["image_id"]])
            result["segmentation"] = clean_mask(rle)
        if self.num_points:
            result["keypoints"] = annotation.get("keypoints")
            if not _is_labelled(annotation):
                # COCO ignores what lies in the box of an object without labelled keypoints, if
                # nothing of a lower score does.
                x, y, width, height = annotation["bbox"]
                result["keypoints"] = [x + width / 2, y + height / 2, 0] * self.num_points
                result["score"] = 0.5
        return result


class _VOC(_Instances):
    def missed(self, low: dict[str, float]) -> Iterator[str]:
        for record in self.records if low else ():
            seen = set()
            for number, each in enumerate(_objects(record), start=1):
                x1, y1, x2, y2 = BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS)
                same = (each["category_id"], x1, y1, x2, y2) in seen
                seen.add((each["category_id"], x1, y1, x2, y2))
                if same or x2 <= x1 or y2 <= y1:
                    reason = "is there twice" if same else "is empty"
                    yield f"{_place(record, number)}: its box {each['bbox']} {reason}"

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        yield from super().notes(low)
        classes = MetadataCatalog.get(self.name).thing_classes
        there = {each["category_id"] for record in self.records for each in _objects(record)}
        if len(there) < len(classes):
            yield (
                f"{len(classes) - len(there)} of {len(classes)} classes have no object, VOC's AP "
                f"of such a class is 0; what can be reached is {_describe(low)}"
            )


class _CityscapesInstances(_Instances):
    def missed(self, low: dict[str, float]) -> Iterator[str]:
        folder = self.evaluator._metadata.gt_dir
        for record in self.records if low else ():
            city, name = record["file_name"].split(os.sep)[-2:]
            name = name.replace("leftImg8bit", "gtFine_instanceIds")
            ids = read_labels(os.path.join(folder, city, name))
            for number, mask in enumerate(_masks(record).numpy(), start=1):
                inside = np.bincount(ids[mask > 0], minlength=1)
                union = mask.sum() + (ids == inside.argmax()).sum() - inside.max()
                if inside.max() < _MIN_IOU * max(1, union):
                    iou = inside.max() / max(1, union)
                    yield f"{_place(record, number)}: IoU {iou:.2f} with its region of {name}"


class _SemSeg(_Format):
    def output(self, record: dict) -> dict[str, Any]:
        labels = read_labels(record["sem_seg_file_name"])
        is_class = (labels >= 0) & (labels < len(MetadataCatalog.get(self.name).stuff_classes))
        # The evaluator counts them as something else, without a word.
        strange = labels[~is_class & (labels != MetadataCatalog.get(self.name).ignore_label)]
        if strange.size:
            self.strange.append(
                f"{record['file_name']}: {strange.size} pixels of {record['sem_seg_file_name']} "
                f"have labels that are no class, such as {strange[0]}"
            )
        # What is ignored may be anything.
        best = torch.from_numpy(np.where(is_class, labels, 0))
        # All that is asked of class scores: as (K, H, W) they would take seconds.
        return {"sem_seg": SimpleNamespace(argmax=lambda dim: best)}


class _CityscapesSemSeg(_SemSeg):
    def missed(self, low: dict[str, float]) -> Iterator[str]:
        from cityscapesscripts.helpers.labels import id2label

        for record in self.records if low else ():
            file = record["sem_seg_file_name"].replace("labelTrainIds", "labelIds")
            ids, labels = read_labels(file), read_labels(record["sem_seg_file_name"])
            for label in np.unique(ids):
                wrong = (ids == label) & (labels != id2label[label].trainId)
                if not id2label[label].ignoreInEval and wrong.any():
                    yield (
                        f"{record['file_name']}: {wrong.sum()} pixels of {id2label[label].name} in "
                        f"{file} are something else in {record['sem_seg_file_name']}"
                    )


class _Panoptic(_Format):
    def __post_init__(self) -> None:
        self.metadata = MetadataCatalog.get(self.name)
        with PathManager.open(self.metadata.panoptic_json) as file:
            self.truth = {each["image_id"]: each for each in json.load(file)["annotations"]}

    def output(self, record: dict) -> dict[str, Any]:
        ids, segments = self._segments(record)
        there = np.unique(ids)
        segments = [{k: s[k] for k in ("id", "category_id")} for s in segments if s["id"] in there]
        ids[~np.isin(ids, [each["id"] for each in segments])] = 0
        return {"panoptic_seg": (torch.from_numpy(ids), segments)}

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        for record in self.records if "panoptic_seg" in low else ():
            ids, segments = self._segments(record)
            for number in sorted({each["id"] for each in segments} - {*np.unique(ids).tolist()}):
                file = self.truth[record["image_id"]]["file_name"]
                yield f"{_place(record, number)}: {file} has no pixel of this segment"

    def _segments(self, record: dict) -> tuple[np.ndarray, list[dict]]:
        """The segment of each pixel, (H, W), and the segments that are no crowds."""
        from panopticapi.utils import rgb2id

        truth = self.truth[record["image_id"]]
        ids = rgb2id(read_labels(os.path.join(self.metadata.panoptic_root, truth["file_name"])))
        return ids, [each for each in truth["segments_info"] if not each.get("iscrowd", 0)]


_FORMATS: dict[type, type[_Format]] = {
    COCOEvaluator: _COCO,
    PascalVOCDetectionEvaluator: _VOC,
    CityscapesInstanceEvaluator: _CityscapesInstances,
    SemSegEvaluator: _SemSeg,
    CityscapesSemSegEvaluator: _CityscapesSemSeg,
    COCOPanopticEvaluator: _Panoptic,
}


def _objects(record: dict) -> list[dict]:
    return [each for each in record.get("annotations", ()) if not each.get("iscrowd", 0)]


def _is_labelled(annotation: dict) -> bool:
    return any(visibility > 0 for visibility in annotation.get("keypoints", ())[2::3])


def _rle(annotation: dict, height: int, width: int) -> dict:
    """Empty where there is no mask."""
    mask = clean_mask(annotation.get("segmentation"))
    return to_rle(mask or {"size": [height, width], "counts": [height * width]}, (height, width))


def _masks(record: dict) -> torch.Tensor:
    """(N, H, W) uint8, each in columns, which pycocotools reads without a copy."""
    height, width = record["height"], record["width"]
    rles = [_rle(each, height, width) for each in _objects(record)]
    decoded = mask_util.decode(rles) if rles else np.zeros((height, width, 0), np.uint8)
    return torch.from_numpy(decoded).permute(2, 0, 1)


def _place(record: dict, number: int) -> str:
    return f"{record['file_name']}: image {record['image_id']}, annotation {number}"


def _describe(scores: dict[str, float]) -> str:
    return ", ".join(f"{task} {score:.2f}" for task, score in scores.items())


def _limit_note(
    what: str, limit: int | None, counts: Counter, low: dict[str, float]
) -> Iterator[str]:
    beyond = [count - limit for count in counts.values() if limit is not None and count > limit]
    if beyond and low:
        yield (
            f"{sum(beyond)} objects on {len(beyond)} images are more than {what} {limit}; what can "
            f"be reached is {_describe(low)}"
        )

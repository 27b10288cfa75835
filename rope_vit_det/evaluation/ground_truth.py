"""A dataset's ground truth, scored against itself by the evaluator that a run will use.

What an evaluator cannot digest, or cannot find, would cost a training at its first evaluation.
"""

import contextlib
import io
import json
import logging
import os
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
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
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager

from ..data.coco_file import clean_mask, clean_records, complete_coco, to_rle
from ..errors import InputError
from .evaluators import EVALUATORS, read_labels
from .fast import LVIS_MAX_DETECTIONS, as_api
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
    """Puts the ground truth through an evaluator, as predictions; nothing is printed or logged.

    Crowds give no prediction, objects without labelled keypoints none of keypoints.

    Args:
        evaluator: of this dataset; its state is lost.
        detections_per_image: TEST.DETECTIONS_PER_IMAGE, below 0: without limit.
        fields: of the `Instances` that the model puts out, such as "pred_masks"; none: proposals.
            None: all that the data has.

    Raises:
        InputError: the evaluator fails on it, or finds nothing.
    """
    with _silence():
        try:
            return _score(dataset_name, evaluator, detections_per_image, fields)
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
    name: str, evaluator: DatasetEvaluator, limit: int, fields: Collection[str] | None
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


class _Format:
    """The outputs of a perfect model for one evaluator, and what that evaluator misses of them."""

    is_scored = True

    def __init__(
        self,
        name: str,
        evaluator: Any,
        records: list[dict],
        fields: Collection[str] | None,
        limit: int,
    ) -> None:
        self.name, self.evaluator, self.records = name, evaluator, records
        self.fields, self.limit = fields, limit
        self.strange: list[str] = []

    def output(self, record: dict) -> dict[str, Any]:
        raise NotImplementedError

    def complete(self, record: dict) -> None:
        """After the evaluator has processed an output."""

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        """Lines on the objects that were not found, where the scores of these tasks are low."""
        raise NotImplementedError

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        yield from ()


class _Instances(_Format):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        objects = [each for record in self.records for each in _objects(record)]
        labelled = [each["keypoints"] for each in objects if _is_labelled(each)]
        self.is_scored = bool(objects) and self._predicts("pred_boxes", True)
        self.masks = self._predicts("pred_masks", any("segmentation" in each for each in objects))
        self.keypoints = self._predicts("pred_keypoints", True) * len(labelled[:1] and labelled[0])

    def _predicts(self, field: str, is_there: bool) -> bool:
        return is_there if self.fields is None else field in self.fields

    def output(self, record: dict, *, all_objects: bool = False) -> dict[str, Any]:
        objects = _objects(record)[: self.limit if self.limit >= 0 and not all_objects else None]
        instances = Instances((record.get("height", 0), record.get("width", 0)))
        boxes = [
            BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in objects
        ]
        instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.as_tensor([each["category_id"] for each in objects]).long()
        instances.scores = torch.ones(len(objects))
        if self.masks:
            instances.pred_masks = _masks(objects, record["height"], record["width"])
        if self.keypoints:
            # COCO ignores what lies in the box of an object without labelled keypoints, if nothing
            # of a lower score does.
            points = [
                each["keypoints"]
                if _is_labelled(each)
                else [(x1 + x2) / 2, (y1 + y2) / 2, 0] * (self.keypoints // 3)
                for each, (x1, y1, x2, y2) in zip(objects, boxes, strict=True)
            ]
            instances.pred_keypoints = torch.tensor(points).float().reshape(len(objects), -1, 3)
            instances.scores -= 0.5 * ~torch.tensor([*map(_is_labelled, objects)], dtype=torch.bool)
        return {"instances": instances}

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        counts = Counter({i: len(_objects(record)) for i, record in enumerate(self.records)})
        yield from _limit_note("TEST.DETECTIONS_PER_IMAGE", self.limit, counts, low)


class _COCO(_Instances):
    """LVIS's too."""

    def __init__(self, name: str, evaluator: Any, records: list[dict], *args: Any) -> None:
        self.is_lvis = isinstance(evaluator, LVISEvaluator)
        truth = evaluator._lvis_api if self.is_lvis else evaluator._coco_api
        self.truth = complete_coco(truth.dataset, f"dataset {name!r}")
        self._add_dropped(records)
        super().__init__(name, evaluator, records, *args)
        self.is_scored &= self.evaluator._do_evaluation
        # Their pixels would take most of the time: the evaluators keep RLE.
        self.has_rle, self.masks = self.masks, False

    def _add_dropped(self, records: list[dict]) -> None:
        """Detectron2 leaves an object without a good part of its mask out, also of boxes."""
        maskless: dict[int, list[dict]] = {}
        for each in self.truth.get("annotations", ()):
            if "segmentation" not in each and "keypoints" not in each:
                maskless.setdefault(each["image_id"], []).append(each)
        order = sorted(each["id"] for each in self.truth["categories"])
        for record in records if maskless else ():
            objects = record.get("annotations", [])
            known = [[*each["bbox"]] for each in objects]
            for each in maskless.get(record["image_id"], ()):
                if each["bbox"] not in known:
                    own = {"category_id": order.index(each["category_id"])}
                    objects.append({**each, **own, "bbox_mode": BoxMode.XYWH_ABS})
            record["annotations"] = objects

    def complete(self, record: dict) -> None:
        self._add_rle(record, self.evaluator._predictions[-1]["instances"])

    def _add_rle(self, record: dict, results: list[dict]) -> list[dict]:
        size = (record["height"], record["width"])
        for each, result in zip(_objects(record) if self.has_rle else (), results, strict=False):
            mask = _rle(each, *size)
            result["segmentation"] = clean_mask(mask)
        return results

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        mapping = MetadataCatalog.get(self.name).get("thing_dataset_id_to_contiguous_id", {})
        ids = {contiguous: own for own, contiguous in mapping.items()}
        found, files = [], {}
        for record in self.records if low else ():
            files[record["image_id"]] = record["file_name"]
            output = self.output(record, all_objects=True)["instances"]
            found += self._add_rle(record, instances_to_coco_json(output, record["image_id"]))
        for each in found:
            each["category_id"] = ids.get(each["category_id"], each["category_id"] + self.is_lvis)
        lines: dict[str, list[str]] = {}
        for task in low:
            sigmas = getattr(self.evaluator, "_kpt_oks_sigmas", None)
            matches = match_images(
                as_api(self.truth),
                found,
                min_score=0,
                iou=_MIN_IOU,
                task=task,
                keypoint_sigmas=sigmas,
            )
            for image, each in (
                (match.image["id"], each) for match in matches for each in match.missed
            ):
                place = f"{files.get(image)}: image {image}, annotation {each['id']}"
                lines.setdefault(f"{place}, box {each['bbox']}", []).append(task)
        yield from (f"{place}: not found by {', '.join(lines[place])}" for place in lines)

    def notes(self, low: dict[str, float]) -> Iterator[str]:
        yield from super().notes(low)
        counts: Counter[Any] = Counter()
        labelled: Counter[Any] = Counter()
        for record in self.records:
            for each in _objects(record):
                key = (record["image_id"], None if self.is_lvis else each["category_id"])
                counts[key] += 1
                labelled[key] += _is_labelled(each)
        limit: Any = self.evaluator._max_dets_per_image or LVIS_MAX_DETECTIONS
        what, limit = ("image", limit) if self.is_lvis else ("image and class", limit[-1])
        boxes = {task: score for task, score in low.items() if task != "keypoints"}
        yield from _limit_note(f"the evaluator's detections of an {what},", limit, counts, boxes)
        points = {task: score for task, score in low.items() if task == "keypoints"}
        what = "COCO's keypoint detections of an image and class,"
        yield from _limit_note(what, _MAX_KEYPOINT_DETECTIONS, labelled, points)


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
            masks = self.output(record, all_objects=True)["instances"].pred_masks.numpy()
            for number, mask in enumerate(masks, start=1):
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
        return {"sem_seg": _BestClass(np.where(is_class, labels, 0))}

    def missed(self, low: dict[str, float]) -> Iterator[str]:
        yield from self.strange


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
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
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
    LVISEvaluator: _COCO,
    PascalVOCDetectionEvaluator: _VOC,
    CityscapesInstanceEvaluator: _CityscapesInstances,
    SemSegEvaluator: _SemSeg,
    CityscapesSemSegEvaluator: _CityscapesSemSeg,
    COCOPanopticEvaluator: _Panoptic,
}


class _BestClass:
    """Class scores of which only the best class is known: as (K, H, W) they would take seconds."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels = torch.from_numpy(labels)

    def argmax(self, dim: int) -> torch.Tensor:
        return self._labels


def _objects(record: dict) -> list[dict]:
    return [each for each in record.get("annotations", ()) if not each.get("iscrowd", 0)]


def _is_labelled(annotation: dict) -> bool:
    return any(visibility > 0 for visibility in annotation.get("keypoints", ())[2::3])


def _rle(annotation: dict, height: int, width: int) -> dict:
    """Empty where there is no mask."""
    mask = clean_mask(annotation.get("segmentation"))
    return to_rle(mask or {"size": [height, width], "counts": [height * width]}, (height, width))


def _masks(objects: list[dict], height: int, width: int) -> torch.Tensor:
    """(N, H, W) uint8, each in columns, which pycocotools reads without a copy."""
    rles = [_rle(each, height, width) for each in objects]
    decoded = mask_util.decode(rles) if rles else np.zeros((height, width, 0), np.uint8)
    return torch.from_numpy(decoded).permute(2, 0, 1)


def _place(record: dict, number: int) -> str:
    return f"{record['file_name']}: image {record['image_id']}, annotation {number}"


def _describe(scores: dict[str, float]) -> str:
    return ", ".join(f"{task} {score:.2f}" for task, score in scores.items())


def _limit_note(what: str, limit: int, counts: Counter, low: dict[str, float]) -> Iterator[str]:
    beyond = [count - limit for count in counts.values() if count > limit >= 0]
    if beyond and low:
        yield (
            f"{sum(beyond)} objects on {len(beyond)} images are more than {what} {limit}; what can "
            f"be reached is {_describe(low)}"
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What evaluators log, print and warn of is about no model."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(before)

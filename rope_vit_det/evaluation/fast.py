"""COCO's and LVIS's metrics through faster-coco-eval.

It computes what pycocotools and lvis compute, in C++: Detectron2's own compiled evaluation is not
in every copy of it, and lvis 0.5.3 does not run on NumPy 2.
"""

import io
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import faster_coco_eval
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..data.coco_file import COCO_KEYPOINTS, ground_truth, to_rle
from ..errors import InputError

logger = logging.getLogger(__name__)

COCO_MAX_DETECTIONS = 100  # of an image and class
LVIS_MAX_DETECTIONS = 300  # of an image
TRUTH_FILE = "ground_truth.json"  # what a dataset was evaluated against that has no file
_FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's :class:`COCOEvaluator`, fast, and able to do without 'area' and 'iscrowd'."""

    _results_file = "coco_instances_results.json"

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
        use_fast_impl: bool = True,
        allow_cached_coco: bool = False,
    ) -> None:
        """
        Args:
            dataset_name: as registered with Detectron2.
            tasks: of "bbox", "segm", "keypoints"; None: those of the predictions.
            distributed: collect the results of all processes.
            output_dir: for the results.
            max_dets_per_image, kpt_oks_sigmas: of :class:`COCOEvaluator`.
            use_fast_impl, allow_cached_coco: not used.

        Raises:
            InputError: see :func:`~rope_vit_det.data.coco_file.ground_truth`.
        """
        # Detectron2's own __init__ keeps the first conversion of a function's dicts for ever.
        self._logger = logger
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._max_dets_per_image = [1, 10, max_dets_per_image or COCO_MAX_DETECTIONS]
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._truth = ground_truth(dataset_name)
        self._coco_api = as_api(self._truth)
        # Without annotations, results are written for the evaluation server.
        self._do_evaluation = "annotations" in self._truth

    def reset(self) -> None:
        super().reset()
        self._fields: set[str] = set()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        super().process(inputs, outputs)
        # Where nothing is found, they alone say what was looked for.
        for output in outputs:
            if "instances" in output:
                self._fields |= output["instances"].get_fields().keys()

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        tasks = {"segm": "pred_masks", "keypoints": "pred_keypoints"}
        looked_for = {task for task, field in tasks.items() if field in self._fields}
        return sorted(looked_for.union(super()._tasks_from_predictions(predictions)))

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        ids = dict(enumerate(sorted(each["id"] for each in self._truth["categories"])))
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", None)
        if mapping is not None:
            ids = {contiguous: dataset_id for dataset_id, contiguous in mapping.items()}
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        for result in results:
            result["category_id"] = ids[result["category_id"]]
        _write(results, self._output_dir, self._results_file)
        if self._metadata.get("json_file", None) is None:
            _write(self._truth, self._output_dir, TRUTH_FILE)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            self._results[task] = self._scores(results, task, img_ids)

    def _scores(self, results: list[dict], task: str, img_ids: list | None) -> dict[str, float]:
        """Where AP counts more detections than COCO's, "maxDets" among the scores says so."""
        limits: dict[str, Any] = {"maxDets": self._max_dets_per_image}
        if task == "keypoints":
            limits = {"kpt_oks_sigmas": self._kpt_oks_sigmas}
        evaluated = None
        if results:
            evaluated = evaluate(self._truth, results, task, image_ids=img_ids, **limits)
            evaluated.summarize()
        names = self._metadata.get("thing_classes")
        scores = self._derive_coco_results(evaluated, task, class_names=names)
        if not results and names and len(names) > 1:  # then Detectron2 leaves the classes out
            scores |= {f"AP-{name}": float("nan") for name in names}
        if task != "keypoints" and self._max_dets_per_image[-1] != COCO_MAX_DETECTIONS:
            scores["maxDets"] = self._max_dets_per_image[-1]
        return scores


class FastLVISEvaluator(FastCOCOEvaluator):
    """Detectron2's `LVISEvaluator` without the package lvis; logs AP of each class, too.

    APr, APc and APf are left out where a category has no "frequency".
    """

    _results_file = "lvis_instances_results.json"

    def __init__(self, *args: Any, max_dets_per_image: int | None = None, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs, max_dets_per_image: of `LVISEvaluator`.
        """
        super().__init__(*args, **kwargs)
        self._max_dets_per_image = [max_dets_per_image or LVIS_MAX_DETECTIONS]
        categories = self._truth["categories"]
        self._has_frequencies = all(each.get("frequency") in _FREQUENCIES for each in categories)
        if not self._has_frequencies:  # the evaluation fails without one
            logger.warning("Categories without 'frequency': no APr, APc, APf")
            self._truth["categories"] = [{**each, "frequency": "f"} for each in categories]

    def _scores(self, results: list[dict], task: str, img_ids: list | None) -> dict[str, float]:
        evaluated = None
        if results:
            best = _best_of_each_image(results, self._max_dets_per_image[-1])
            limit = self._max_dets_per_image
            evaluated = evaluate(self._truth, best, task, lvis_style=True, maxDets=limit)
            evaluated.summarize()
        names = [each["name"] for each in sorted(self._truth["categories"], key=lambda c: c["id"])]
        scores = self._derive_coco_results(evaluated, task, class_names=names)
        # They would be 1,203 curves.
        scores = {metric: value for metric, value in scores.items() if "-" not in metric}
        if self._has_frequencies:
            rest = evaluated.all_stats[-len(_FREQUENCIES) :] if evaluated else [-1] * 3
            found = zip(_FREQUENCIES.values(), rest, strict=True)
            scores |= {metric: float(v * 100 if v >= 0 else "nan") for metric, v in found}
        return scores


def evaluate(
    truth: Mapping[str, Any],
    results: Sequence[dict],
    task: str,
    *,
    image_ids: Iterable | None = None,
    lvis_style: bool = False,
    **params: Any,
) -> faster_coco_eval.COCOeval_faster:
    """Evaluates COCO results.

    Args:
        truth: of :func:`~rope_vit_det.data.coco_file.complete_coco`, with annotations.
        results: COCO results of its images; left as they are.
        task: "bbox", "segm" or "keypoints".
        image_ids: only these.
        lvis_style: LVIS's rules for what is not annotated.
        params: of pycocotools' `Params`, such as maxDets; kpt_oks_sigmas may be empty: COCO's.

    Returns:
        What has the interface of pycocotools' `COCOeval`, before its summary. Annotations and
        results are numbered from 1 in it, in their order.

    Raises:
        InputError: there are not as many keypoints in the one as in the other, or as sigmas.
    """
    sigmas = params.pop("kpt_oks_sigmas", ())
    numbered, found, images = _number(truth, results, task, sigmas)
    api = faster_coco_eval.COCO(numbered)
    # Not every version can load an empty list.
    detections = (
        api.loadRes(found) if found else faster_coco_eval.COCO({**numbered, "annotations": []})
    )
    evaluation = faster_coco_eval.COCOeval_faster(
        api, detections, task, lvis_style=lvis_style, print_function=logger.info
    )
    evaluation.params.catIds = sorted(each["id"] for each in truth["categories"])
    if sigmas:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    if image_ids is not None:
        evaluation.params.imgIds = [images[each] for each in image_ids]
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def as_api(content: Mapping[str, Any]) -> COCO:
    """pycocotools' object of annotations in COCO's format."""
    api = COCO()
    api.dataset = content
    with redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def with_masks(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """COCO results without those whose masks are empty, which "segm" leaves out."""
    return [each for each in results if mask_util.area(each["segmentation"])]


def _number(
    truth: Mapping[str, Any], results: Sequence[dict], task: str, sigmas: Sequence[float]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, int]]:
    """Ground truth and results of a task, as COCO's evaluation needs them.

    Their ids count from 1, in the order of what they were made of: COCO's evaluation keeps ids as
    float64, takes 0 for none, and faster-coco-eval none below 0 of an image. For "segm", an object
    without a mask is a crowd that fills its box: what is found there counts neither way.

    Returns:
        The ground truth, the results, and the id of each image to its number.
    """
    order = sorted(truth["images"], key=lambda image: image["id"])
    images = {image["id"]: i for i, image in enumerate(order, start=1)}
    # With a box, the area of a mask would be that of the box.
    dropped = "bbox" if task == "segm" else "segmentation"
    found = [
        {k: v for k, v in each.items() if k != dropped} | {"image_id": images[each["image_id"]]}
        for each in (with_masks(results) if task == "segm" else results)
    ]
    objects = [
        {**each, "id": i, "image_id": images[each["image_id"]]}
        for i, each in enumerate(truth["annotations"], start=1)
    ]
    if task == "segm":
        for each in objects:
            image = order[each["image_id"] - 1]
            _make_mask(each, (image["height"], image["width"]))
    elif task == "keypoints":
        num_values = _num_keypoint_values([*objects, *found], sigmas)
        for each in objects:
            each["keypoints"] = each.get("keypoints") or [0] * num_values
            each["num_keypoints"] = sum(visible > 0 for visible in each["keypoints"][2::3])
    numbered = [{**image, "id": i} for i, image in enumerate(order, start=1)]
    return {**truth, "images": numbered, "annotations": objects}, found, images


def _make_mask(annotation: dict[str, Any], size: tuple[int, int]) -> None:
    mask = annotation.get("segmentation")
    rle = to_rle(mask, size) if mask else None
    if rle is None or not mask_util.area(rle):
        x, y, width, height = annotation["bbox"]
        left, top = math.floor(x), math.floor(y)
        box = [left, top, math.ceil(x + width) - left, math.ceil(y + height) - top]
        rle = mask_util.frPyObjects(np.array([box], np.float64), *size)[0]
        annotation["iscrowd"] = 1
    annotation["segmentation"] = rle


def _num_keypoint_values(entries: list[dict], sigmas: Sequence[float]) -> int:
    num_points = len(sigmas) or COCO_KEYPOINTS
    others = {len(each["keypoints"]) // 3 for each in entries if each.get("keypoints")}
    others.discard(num_points)
    if others:
        raise InputError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {num_points} values (where it is empty, COCO's), "
            f"objects have {', '.join(map(str, sorted(others)))} keypoints; set one each"
        )
    return 3 * num_points


def _best_of_each_image(results: list[dict], most: int) -> list[dict]:
    by_image: dict[Any, list[dict]] = {}
    for result in sorted(results, key=lambda each: each["score"], reverse=True):
        by_image.setdefault(result["image_id"], []).append(result)
    return [result for each in by_image.values() for result in each[:most]]


def _write(content: Any, folder: str | None, name: str) -> None:
    if folder:
        path = os.path.join(folder, name)
        logger.info("Saving results to %s", path)
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(content))

"""COCO's and LVIS's metrics through faster-coco-eval, where it is installed.

It computes what pycocotools and lvis compute, in C++: Detectron2's own compiled evaluation is not
in every copy of it, and lvis 0.5.3 does not run on NumPy 2.
"""

import importlib.util
import io
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from tabulate import tabulate

from ..data.coco_file import COCO_KEYPOINTS, ground_truth, to_rle
from ..errors import InputError

logger = logging.getLogger(__name__)

COCO_MAX_DETECTIONS = 100  # of an image and class
LVIS_MAX_DETECTIONS = 300  # of an image
TRUTH_FILE = "ground_truth.json"  # what a dataset was evaluated against that has no file
_LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LVIS_FREQUENCIES = ("APr", "APc", "APf")


def is_installed() -> bool:
    """Whether faster-coco-eval is."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class _CompletedTruth:
    """What the evaluators share: ground truth that is completed, and never a stale conversion."""

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: as registered with Detectron2.
            tasks: of "bbox", "segm", "keypoints"; None: those of the predictions.
            distributed: collect the results of all processes.
            output_dir: for the results.

        Raises:
            InputError: see :func:`~rope_vit_det.data.coco_file.ground_truth`.
        """
        # Detectron2's own __init__ keeps the first conversion of a function's dicts for ever.
        self._logger = logger
        self._name = dataset_name
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._truth = ground_truth(dataset_name)

    def _write_results(self, predictions: list[dict], ids: Mapping[int, int], name: str) -> list:
        """The predictions of all images, with the dataset's category ids."""
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        for result in results:
            result["category_id"] = ids[result["category_id"]]
        _write(results, self._output_dir, name)
        if self._metadata.get("json_file", None) is None:
            _write(self._truth, self._output_dir, TRUTH_FILE)
        return results


class FastCOCOEvaluator(_CompletedTruth, COCOEvaluator):
    """Detectron2's :class:`COCOEvaluator`, fast, and able to do without 'area' and 'iscrowd'.

    Without faster-coco-eval it is as fast as Detectron2's.
    """

    def __init__(
        self,
        *args: Any,
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
        use_fast_impl: bool = True,
        allow_cached_coco: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs, max_dets_per_image, kpt_oks_sigmas: of :class:`COCOEvaluator`.
            use_fast_impl, allow_cached_coco: not used.
        """
        super().__init__(*args, **kwargs)
        self._max_dets_per_image = [1, 10, max_dets_per_image or COCO_MAX_DETECTIONS]
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._coco_api = as_api(self._truth)
        # Without annotations, results are written for the evaluation server.
        self._do_evaluation = "annotations" in self._truth

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Where AP counts more detections than COCO's, "maxDets" among the results says so."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type != "keypoints" and self._max_dets_per_image[-1] != COCO_MAX_DETECTIONS:
            results["maxDets"] = self._max_dets_per_image[-1]
        return results

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        ids = dict(enumerate(sorted(each["id"] for each in self._truth["categories"])))
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", None)
        if mapping is not None:
            ids = {contiguous: dataset_id for dataset_id, contiguous in mapping.items()}
        results = self._write_results(predictions, ids, "coco_instances_results.json")
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        names = self._metadata.get("thing_classes")
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            evaluated = None
            if results:
                evaluated = evaluate(
                    self._truth,
                    results,
                    task,
                    max_detections=self._max_dets_per_image,
                    image_ids=img_ids,
                    keypoint_sigmas=self._kpt_oks_sigmas,
                )
            self._results[task] = self._derive_coco_results(evaluated, task, class_names=names)


class FastLVISEvaluator(_CompletedTruth, LVISEvaluator):
    """Detectron2's :class:`LVISEvaluator` without the package lvis, and with AP of each class.

    APr, APc and APf are left out where a category has no "frequency".
    """

    def __init__(self, *args: Any, max_dets_per_image: int | None = None, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs, max_dets_per_image: of :class:`LVISEvaluator`.
        """
        super().__init__(*args, **kwargs)
        self._max_dets_per_image = max_dets_per_image or LVIS_MAX_DETECTIONS
        categories = self._truth["categories"]
        known = all(each.get("frequency") in ("r", "c", "f") for each in categories)
        self._frequencies = _LVIS_FREQUENCIES if known else ()
        if not known:  # the evaluation fails without one
            logger.warning("%s: categories without 'frequency': no APr, APc, APf", self._name)
            self._truth["categories"] = [{**each, "frequency": "f"} for each in categories]
        # Without annotations, results are written for the evaluation server.
        self._do_evaluation = bool(self._truth.get("annotations"))

    @cached_property
    def _lvis_api(self) -> Any:
        """For Detectron2's evaluation of proposals."""
        from faster_coco_eval import COCO

        return COCO(self._truth)

    def _eval_predictions(self, predictions: list[dict]) -> None:
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", None) or {
            each["id"]: each["id"] - 1 for each in self._truth["categories"]
        }
        ids = {contiguous: own for own, contiguous in mapping.items()}
        results = self._write_results(predictions, ids, "lvis_instances_results.json")
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            self._results[task] = self._scores(results, task)

    def _scores(self, results: list[dict], task: str) -> dict[str, float]:
        metrics = _LVIS_METRICS + self._frequencies
        if not results:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(metrics, float("nan"))
        evaluated = evaluate(
            self._truth,
            _best_of_each_image(results, self._max_dets_per_image),
            task,
            max_detections=[self._max_dets_per_image],
            lvis_style=True,
        )
        stats = evaluated.all_stats
        values = (*stats[: len(_LVIS_METRICS)], *stats[-len(_LVIS_FREQUENCIES) :])
        scores = {
            metric: float(value * 100 if value >= 0 else "nan")
            for metric, value in zip(metrics, values, strict=False)
        }
        logger.info("Evaluation results for %s:\n%s", task, create_small_table(scores))
        order = sorted(self._truth["categories"], key=lambda each: each["id"])
        names = [each["name"] for each in order]
        # Not among the results: they would be 2,406 curves.
        table = class_table(names, evaluated.eval["precision"])
        logger.info("Per-category %s AP:\n%s", task, table)
        return scores


class Numbered(NamedTuple):
    """Ground truth and results of a task, as COCO's evaluation needs them.

    Their ids count from 1, in the order of what they were made of: COCO's evaluation keeps ids as
    float64, takes 0 for none, and faster-coco-eval none below 0 of an image.

    Attributes:
        truth: COCO's format. For "segm", an object without a mask is a crowd that fills its box:
            what is found there counts neither way.
        results: COCO results, for "segm" without empty masks.
        images: the id of each image to its number.
        kept: of each result, its index in what was given.
    """

    truth: dict[str, Any]
    results: list[dict[str, Any]]
    images: dict[int, int]
    kept: list[int]


def number(
    truth: Mapping[str, Any],
    results: Sequence[dict[str, Any]],
    task: str,
    keypoint_sigmas: Sequence[float] | None = None,
) -> Numbered:
    """
    Args:
        truth: of :func:`~rope_vit_det.data.coco_file.complete_coco`, with annotations.
        results: COCO results of its images; left as they are.
        task: "bbox", "segm" or "keypoints".
        keypoint_sigmas: none: COCO's.

    Raises:
        InputError: there are not as many keypoints in the one as in the other, or as sigmas.
    """
    order = sorted(truth["images"], key=lambda image: image["id"])
    images = {image["id"]: i for i, image in enumerate(order, start=1)}
    # With a box, the area of a mask would be that of the box.
    dropped = {"segm": ("bbox",), "bbox": ("segmentation",), "keypoints": ("segmentation",)}[task]
    kept = [
        i
        for i, each in enumerate(results)
        if task != "segm" or mask_util.area(each["segmentation"])
    ]
    found = [
        {k: v for k, v in results[i].items() if k not in dropped}
        | {"image_id": images[results[i]["image_id"]]}
        for i in kept
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
        num_values = _num_keypoint_values([*objects, *found], keypoint_sigmas)
        for each in objects:
            each["keypoints"] = each.get("keypoints") or [0] * num_values
            each["num_keypoints"] = sum(visible > 0 for visible in each["keypoints"][2::3])
    numbered = [{**image, "id": i} for i, image in enumerate(order, start=1)]
    return Numbered({**truth, "images": numbered, "annotations": objects}, found, images, kept)


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


def _num_keypoint_values(entries: list[dict], sigmas: Sequence[float] | None) -> int:
    num_points = len(sigmas or ()) or COCO_KEYPOINTS
    others = {len(each["keypoints"]) // 3 for each in entries if each.get("keypoints")}
    others.discard(num_points)
    if others:
        raise InputError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {num_points} values (where it is empty, COCO's), "
            f"objects have {', '.join(map(str, sorted(others)))} keypoints; set one each"
        )
    return 3 * num_points


def evaluate(
    truth: Mapping[str, Any],
    results: Sequence[dict],
    task: str,
    *,
    max_detections: list[int],
    image_ids: Iterable | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    lvis_style: bool = False,
) -> Any:
    """Evaluates COCO results, with faster-coco-eval where it is installed.

    Args:
        truth, results, task, keypoint_sigmas: see :func:`number`.
        max_detections: per image and class, ascending; not for keypoints.
        image_ids: only these.
        lvis_style: LVIS's rules for what is not annotated; needs faster-coco-eval.

    Returns:
        pycocotools' `COCOeval`, or what has its interface, after its summary.

    Raises:
        InputError: see :func:`number`.
    """
    numbered = number(truth, results, task, keypoint_sigmas)
    with redirect_stdout(io.StringIO()):
        if is_installed():
            import faster_coco_eval

            api = faster_coco_eval.COCO(numbered.truth)
            evaluation = faster_coco_eval.COCOeval_faster(
                api,
                api.loadRes(numbered.results),
                task,
                lvis_style=lvis_style,
                print_function=logger.info,
            )
        else:
            evaluation = COCOevalMaxDets(*as_apis(numbered), task)
        evaluation.params.catIds = sorted(each["id"] for each in truth["categories"])
        if task != "keypoints":
            evaluation.params.maxDets = max_detections
        elif keypoint_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(keypoint_sigmas)
        if image_ids is not None:
            evaluation.params.imgIds = [numbered.images[each] for each in image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def as_api(content: Mapping[str, Any]) -> COCO:
    """pycocotools' object of annotations in COCO's format."""
    api = COCO()
    api.dataset = content
    with redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def as_apis(numbered: Numbered) -> tuple[COCO, COCO]:
    """pycocotools' objects of ground truth and results."""
    truth = as_api(numbered.truth)
    with redirect_stdout(io.StringIO()):
        if numbered.results:
            return truth, truth.loadRes(numbered.results)
    return truth, as_api({**numbered.truth, "annotations": []})


def class_table(names: Sequence[str], precision: np.ndarray, columns: int = 3) -> str:
    """AP of each class as a table.

    Args:
        names: of the classes.
        precision: (IoU thresholds, recalls, classes, areas, detection limits), -1: not defined.
    """
    whole = precision[:, :, :, 0, -1]
    cells = []
    for i, name in enumerate(names):
        values = whole[:, :, i][whole[:, :, i] > -1]
        cells += [name, f"{values.mean() * 100:.3f}" if values.size else "nan"]
    rows = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
    return tabulate(rows, ["category", "AP"] * columns, tablefmt="pipe", disable_numparse=True)


def _best_of_each_image(results: list[dict], most: int) -> list[dict]:
    by_image: dict[Any, list[dict]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    best = (
        sorted(each, key=lambda r: r["score"], reverse=True)[:most] for each in by_image.values()
    )
    return list(itertools.chain(*best))


def _write(content: Any, folder: str | None, name: str) -> None:
    if folder:
        path = os.path.join(folder, name)
        logger.info("Saving results to %s", path)
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(content))

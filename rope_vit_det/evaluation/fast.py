"""COCO's and LVIS's metrics through faster-coco-eval, where it is installed.

It computes what pycocotools and lvis compute, in C++: Detectron2's own compiled evaluation is not
in every copy of it, and lvis 0.5.3 does not run on NumPy 2.
"""

import importlib.util
import io
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

logger = logging.getLogger(__name__)

COCO_MAX_DETECTIONS = 100  # of an image and class
LVIS_MAX_DETECTIONS = 300  # of an image
_LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LVIS_FREQUENCIES = ("APr", "APc", "APf")


def is_installed() -> bool:
    """Whether faster-coco-eval is."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's :class:`COCOEvaluator`, fast, and able to do without 'area' and 'iscrowd'.

    Without faster-coco-eval it is as fast as Detectron2's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: of :class:`COCOEvaluator`.
        """
        self._is_fast = is_installed()
        super().__init__(*args, use_fast_impl=not self._is_fast, **kwargs)
        if self._do_evaluation:
            complete_annotations(self._coco_api)
        if self._is_fast:
            from faster_coco_eval import COCO

            self._coco_api = COCO(self._coco_api.dataset)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Where AP counts more detections than COCO's, "maxDets" among the results says so."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type != "keypoints" and self._max_dets_per_image[-1] != COCO_MAX_DETECTIONS:
            results["maxDets"] = self._max_dets_per_image[-1]
        return results

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        if not (self._is_fast and self._do_evaluation):
            super()._eval_predictions(predictions, img_ids)
            return
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        tasks = self._tasks or self._tasks_from_predictions(results)
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", None)
        if mapping is not None:
            ids = {contiguous: dataset_id for dataset_id, contiguous in mapping.items()}
            for result in results:
                result["category_id"] = ids[result["category_id"]]
        _write(results, self._output_dir, "coco_instances_results.json")
        names = self._metadata.get("thing_classes")
        for task in sorted(tasks):
            evaluated = None
            if results:
                evaluated = evaluate_fast(
                    self._coco_api,
                    results,
                    task,
                    max_detections=self._max_dets_per_image,
                    image_ids=img_ids,
                    keypoint_sigmas=self._kpt_oks_sigmas or None,
                )
            self._results[task] = self._derive_coco_results(evaluated, task, class_names=names)


class FastLVISEvaluator(LVISEvaluator):
    """Detectron2's :class:`LVISEvaluator` without the package lvis, and with AP of each class."""

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, distributed: bool = True
    ) -> None:
        """
        Args:
            dataset_name: as registered with Detectron2.
            output_dir: for the results.
            distributed: collect the results of all processes.
        """
        # Detectron2's own __init__ imports lvis.
        from faster_coco_eval import COCO

        self._logger = logger
        self._tasks = None
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets_per_image = LVIS_MAX_DETECTIONS
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._lvis_api = COCO(PathManager.get_local_path(self._metadata.json_file))
        # Without annotations, results are written for the evaluation server.
        self._do_evaluation = bool(self._lvis_api.dataset.get("annotations"))

    def _eval_predictions(self, predictions: list[dict]) -> None:
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        tasks = self._tasks or self._tasks_from_predictions(results)
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", None)
        ids = {contiguous: own for own, contiguous in (mapping or {}).items()}
        for result in results:
            result["category_id"] = ids.get(result["category_id"], result["category_id"] + 1)
        _write(results, self._output_dir, "lvis_instances_results.json")
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(tasks):
            self._results[task] = self._scores(results, task)

    def _scores(self, results: list[dict], task: str) -> dict[str, float]:
        if not results:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(_LVIS_METRICS + _LVIS_FREQUENCIES, float("nan"))
        evaluated = evaluate_fast(
            self._lvis_api,
            _best_of_each_image(results, self._max_dets_per_image),
            task,
            max_detections=[self._max_dets_per_image],
            lvis_style=True,
        )
        stats = evaluated.all_stats
        values = (*stats[: len(_LVIS_METRICS)], *stats[-len(_LVIS_FREQUENCIES) :])
        scores = {
            metric: float(value * 100 if value >= 0 else "nan")
            for metric, value in zip(_LVIS_METRICS + _LVIS_FREQUENCIES, values, strict=True)
        }
        logger.info("Evaluation results for %s:\n%s", task, create_small_table(scores))
        names = [each["name"] for each in self._lvis_api.loadCats(evaluated.params.catIds)]
        # Not among the results: they would be 2,406 curves.
        table = class_table(names, evaluated.eval["precision"])
        logger.info("Per-category %s AP:\n%s", task, table)
        return scores


def evaluate_fast(
    truth: Any,
    results: Iterable[dict],
    task: str,
    *,
    max_detections: list[int],
    image_ids: list | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    lvis_style: bool = False,
) -> Any:
    """Evaluates COCO results with faster-coco-eval.

    Args:
        truth: its `COCO`.
        results: left as they are.
        task: "bbox", "segm" or "keypoints".
        max_detections: per image and class, ascending; not for keypoints.
        image_ids: only these.
        keypoint_sigmas: None: COCO's.
        lvis_style: LVIS's rules for what is not annotated.

    Returns:
        Its `COCOeval_faster`, which has the interface of pycocotools' `COCOeval`.
    """
    from faster_coco_eval import COCOeval_faster

    # With a box, the area of a mask would be that of the box. What is loaded is changed.
    dropped = {"bbox"} if task == "segm" else set()
    copies = [{k: v for k, v in each.items() if k not in dropped} for each in results]
    evaluation = COCOeval_faster(
        truth,
        truth.loadRes(copies),
        task,
        kpt_oks_sigmas=keypoint_sigmas,
        lvis_style=lvis_style,
        print_function=logger.info,
    )
    if task != "keypoints":
        evaluation.params.maxDets = max_detections
    if image_ids is not None:
        evaluation.params.imgIds = image_ids
    evaluation.run()
    return evaluation


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


def complete_annotations(coco: Any) -> None:
    """Gives annotations what pycocotools fails without.

    "iscrowd", "area", "num_keypoints", and ids from 1: an object of id 0 would count as not found.
    """
    annotations = coco.dataset["annotations"]
    renumber = any(annotation["id"] == 0 for annotation in annotations)
    for number, annotation in enumerate(annotations, start=1):
        annotation.setdefault("iscrowd", 0)
        if "keypoints" in annotation:
            labelled = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
            annotation.setdefault("num_keypoints", labelled)
        if "area" not in annotation:
            has_mask = annotation.get("segmentation") and annotation["image_id"] in coco.imgs
            width, height = annotation["bbox"][2:]
            annotation["area"] = (
                float(mask_util.area(coco.annToRLE(annotation))) if has_mask else width * height
            )
        if renumber:
            annotation["id"] = number
    with redirect_stdout(io.StringIO()):
        coco.createIndex()


def _best_of_each_image(results: list[dict], most: int) -> list[dict]:
    by_image: dict[Any, list[dict]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    best = (
        sorted(each, key=lambda r: r["score"], reverse=True)[:most] for each in by_image.values()
    )
    return list(itertools.chain(*best))


def _write(results: list[dict], folder: str | None, name: str) -> None:
    if folder:
        path = os.path.join(folder, name)
        logger.info("Saving results to %s", path)
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(results))

"""The evaluator that belongs to a dataset, by the evaluator_type of its metadata: EVALUATORS.

Each is a function (cfg, dataset_name, output_folder) -> DatasetEvaluator that bears the name of its
type:

    @EVALUATORS.register()
    def counting(cfg, dataset_name, output_folder):
        return CountingEvaluator(dataset_name)

Before a run, :func:`~rope_vit_det.evaluation.ground_truth.score_ground_truth` scores a dataset's
ground truth by it where the function has an attribute `perfect_output`: a function from a dict of
the dataset to what a perfect model puts out for it.
"""

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from fvcore.common.registry import Registry
from PIL import Image

from ..errors import InputError
from .fast import COCO_MAX_DETECTIONS, FastCOCOEvaluator, FastLVISEvaluator

EVALUATORS = Registry("EVALUATORS")


def read_labels(path: str, dtype: type = int) -> np.ndarray:
    """The values of a label image, (H, W), or (H, W, 3) for panoptic ones.

    Detectron2 0.6's own reading fails on NumPy 2.
    """
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


def results_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where the results of a dataset lie: of several, each has a folder of its own in it."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) < 2:
        return folder
    return os.path.join(folder, dataset_name.replace("/", "_"))


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str = "") -> DatasetEvaluator:
    """Chooses by the dataset's `evaluator_type`, as Detectron2's `tools/train_net.py` does.

    Args:
        output_folder: for result files; "": that of :func:`results_folder`.

    Raises:
        InputError: the dataset has no evaluator type, or one that nothing here evaluates; NumPy is
            too new for the type's package; or what is registered makes no evaluator.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise InputError(
            f"DATASETS.TEST: dataset {dataset_name!r} has evaluator_type {kind!r}; set it in its "
            f"MetadataCatalog entry to one of {', '.join(kind for kind, _ in EVALUATORS)}, or "
            "register your own in rope_vit_det.evaluation.EVALUATORS, at the top level of your "
            "script"
        )
    if kind.startswith("cityscapes") and np.lib.NumpyVersion(np.__version__) >= "2.3.0":
        raise InputError(
            f"DATASETS.TEST: {dataset_name!r} cannot be evaluated on NumPy {np.__version__}: "
            "cityscapesScripts 2.3.0 needs an older one; pip install 'numpy<2.3'"
        )
    folder = output_folder or results_folder(cfg, dataset_name)
    evaluator = EVALUATORS.get(kind)(cfg, dataset_name, folder)
    if not hasattr(evaluator, "process"):  # Detectron2 would evaluate nothing, without a word
        raise InputError(
            f"evaluator_type {kind!r} of dataset {dataset_name!r} gives {evaluator!r}; register a "
            "function (cfg, dataset_name, output_folder) that returns a DatasetEvaluator"
        )
    return evaluator


@EVALUATORS.register()
def coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return FastCOCOEvaluator(
        dataset_name,
        output_dir=output_folder,
        max_dets_per_image=max(COCO_MAX_DETECTIONS, cfg.TEST.DETECTIONS_PER_IMAGE),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


@EVALUATORS.register()
def sem_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(dataset_name, output_dir=output_folder, sem_seg_loading_fn=read_labels)


@EVALUATORS.register()
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """PQ alone for the form of Detectron2's `register_coco_panoptic`.

    That has no label images, and its thing_classes hold stuff, which COCO's evaluator refuses.
    """
    parts: list[DatasetEvaluator] = [COCOPanopticEvaluator(dataset_name, output_folder)]
    is_separated = MetadataCatalog.get(dataset_name).get("sem_seg_root", None) is not None
    if is_separated or any(
        "sem_seg_file_name" in each for each in DatasetCatalog.get(dataset_name)
    ):
        parts[:0] = [make(cfg, dataset_name, output_folder) for make in (sem_seg, coco)]
    return DatasetEvaluators(parts)


@EVALUATORS.register()
def lvis(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return FastLVISEvaluator(dataset_name, output_dir=output_folder)


@EVALUATORS.register()
def pascal_voc(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(dataset_name)


@EVALUATORS.register()
def cityscapes_instance(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


@EVALUATORS.register()
def cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


@EVALUATORS.register()
def cityscapes_panoptic_seg(
    cfg: CfgNode, dataset_name: str, output_folder: str
) -> DatasetEvaluator:
    parts = [CityscapesSemSegEvaluator(dataset_name), CityscapesInstanceEvaluator(dataset_name)]
    return DatasetEvaluators([COCOPanopticEvaluator(dataset_name, output_folder), *parts])

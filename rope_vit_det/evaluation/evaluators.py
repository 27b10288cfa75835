"""The evaluator that belongs to a dataset."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..errors import InputError


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str = "") -> DatasetEvaluator:
    """Chooses by the dataset's `evaluator_type`, as Detectron2's `tools/train_net.py` does.

    Args:
        output_folder: for result files; "": `OUTPUT_DIR/inference`.

    Raises:
        InputError: the dataset has no evaluator type, or one that nothing here evaluates.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    makers = {
        "sem_seg": lambda: [SemSegEvaluator(dataset_name, distributed=True, output_dir=folder)],
        "coco": lambda: [COCOEvaluator(dataset_name, output_dir=folder)],
        "coco_panoptic_seg": lambda: [
            SemSegEvaluator(dataset_name, distributed=True, output_dir=folder),
            COCOEvaluator(dataset_name, output_dir=folder),
            COCOPanopticEvaluator(dataset_name, folder),
        ],
        "cityscapes_instance": lambda: [CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": lambda: [CityscapesSemSegEvaluator(dataset_name)],
        "pascal_voc": lambda: [PascalVOCDetectionEvaluator(dataset_name)],
        "lvis": lambda: [LVISEvaluator(dataset_name, output_dir=folder)],
    }
    if kind not in makers:
        raise InputError(
            f"dataset {dataset_name!r} has evaluator_type {kind!r}; set it in its MetadataCatalog "
            f"entry to one of {', '.join(makers)}"
        )
    evaluators = makers[kind]()
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

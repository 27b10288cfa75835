"""The evaluator that belongs to a dataset."""

import importlib.util
import os
from collections.abc import Callable

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..errors import InputError
from .fast import FastCOCOEvaluator, FastLVISEvaluator, is_installed

# What Detectron2 imports once the inference is done.
_PACKAGES = {
    "coco_panoptic_seg": "panopticapi",
    "ade20k_panoptic_seg": "panopticapi",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "cityscapes_panoptic_seg": "panopticapi",
}


def check_evaluator(dataset_name: str) -> None:
    """Checks that a dataset can be evaluated, before the inference that would be for nothing.

    Raises:
        InputError: the dataset has no evaluator type, or one that nothing here evaluates; or a
            package is missing.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in _MAKERS:
        raise InputError(
            f"DATASETS.TEST: dataset {dataset_name!r} has evaluator_type {kind!r}; set it in its "
            f"MetadataCatalog entry to one of {', '.join(_MAKERS)}"
        )
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"DATASETS.TEST: {dataset_name!r} cannot be evaluated without the package {package}; "
            "install it, or take the dataset out"
        )
    if package == "cityscapesscripts" and not _numpy_is_below("2.3.0"):
        raise InputError(
            f"DATASETS.TEST: {dataset_name!r} cannot be evaluated on NumPy {np.__version__}: "
            "cityscapesScripts 2.3.0 needs an older one; pip install 'numpy<2.3'"
        )
    if kind == "lvis" and not is_installed() and not _lvis_works():
        raise InputError(
            f"DATASETS.TEST: {dataset_name!r} cannot be evaluated without the package "
            "faster-coco-eval (lvis 0.5.3 does not run on NumPy 2); pip install faster-coco-eval"
        )


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str = "") -> DatasetEvaluator:
    """Chooses by the dataset's `evaluator_type`, as Detectron2's `tools/train_net.py` does.

    Args:
        output_folder: for result files; "": `OUTPUT_DIR/inference`.

    Raises:
        InputError: see :func:`check_evaluator`.
    """
    check_evaluator(dataset_name)
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = [make(cfg, dataset_name, folder) for make in _MAKERS[kind]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _coco(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    return FastCOCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=sigmas)


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def _lvis(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    if is_installed():
        return FastLVISEvaluator(name, folder)
    return LVISEvaluator(name, output_dir=folder)


_MAKERS: dict[str, tuple[Callable[[CfgNode, str, str], DatasetEvaluator], ...]] = {
    "sem_seg": (_sem_seg,),
    "coco": (_coco,),
    "coco_panoptic_seg": (
        _sem_seg,
        _coco,
        lambda cfg, name, folder: COCOPanopticEvaluator(name, folder),
    ),
    "cityscapes_instance": (lambda cfg, name, folder: CityscapesInstanceEvaluator(name),),
    "cityscapes_sem_seg": (lambda cfg, name, folder: CityscapesSemSegEvaluator(name),),
    "pascal_voc": (lambda cfg, name, folder: PascalVOCDetectionEvaluator(name),),
    "lvis": (_lvis,),
}


def _lvis_works() -> bool:
    return importlib.util.find_spec("lvis") is not None and _numpy_is_below("2.0.0")


def _numpy_is_below(version: str) -> bool:
    return np.lib.NumpyVersion(np.__version__) < version

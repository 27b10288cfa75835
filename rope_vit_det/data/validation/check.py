"""Looking at a dataset before a run depends on it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata

from ...errors import InputError
from ...utils.image_files import any_number_of_pixels
from ..classes import num_classes, registered
from ..coco_file import read_coco
from ..demo.dataset import is_demo_dataset
from ..own import own_datasets
from .faults import Inspection, Use
from .inspection import inspect_coco, inspect_dicts

# Whose evaluators take a detector's classes for their dataset's; a user's own may map them.
_BY_CLASS = ("coco", "lvis", "pascal_voc", "cityscapes_instance", "coco_panoptic_seg")

FAULTS_FILE = "dataset_faults.txt"

# Where Detectron2's metadata keeps the paths of its datasets.
_PATHS = (
    "json_file",
    "image_root",
    "dirname",
    "image_dir",
    "gt_dir",
    "panoptic_json",
    "sem_seg_root",
)


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> list[str] | None:
    """Checks that the datasets are there, are what they say, and fit the model and each other.

    What is wrong is printed, and every fault is listed in OUTPUT_DIR.

    Args:
        eval_only: the training sets are not needed.

    Returns:
        The class names, where a dataset says them.

    Raises:
        InputError: names the dataset, the file and the remedy.
    """
    faults_file = Path(cfg.OUTPUT_DIR, FAULTS_FILE)
    faults_file.unlink(missing_ok=True)
    classes: dict[str, list[str]] = {}
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        if not cfg.DATASETS[key] and (key == "TRAIN" or eval_only):
            raise InputError(f"DATASETS.{key} is empty: name a registered dataset")
        for name in cfg.DATASETS[key]:
            metadata = _find(name, key=f"DATASETS.{key}")
            json_file = metadata.get("json_file", "")
            is_test = key == "TEST"
            kind = metadata.get("evaluator_type", None)
            is_coco = kind == "coco" and json_file and metadata.get("image_root", None) is not None
            if is_coco and "://" in json_file:
                continue
            with any_number_of_pixels(is_test and cfg.TEST.SLICE.ENABLED):
                inspect = _inspect_coco if is_coco else _inspect_dicts
                inspection = inspect(cfg, name, metadata, is_test)
            _report(inspection, faults_file, print_all=name in own_datasets(cfg))
            names = inspection.classes
            if names is not None:
                check_count(cfg, inspection.source, len(names))
                if kind in _BY_CLASS or not is_test:
                    classes[name] = [*map(str, names)]
    first = next(iter(classes), "")
    for name, names in classes.items():
        check_same_classes(names, f"dataset {name!r}", classes[first], f"dataset {first!r}")
    return classes.get(first)


def check_same_classes(names: list[str], owner: str, others: list[str], other: str) -> None:
    """Checks that class i is the same one on both sides.

    Args:
        names: in the order of their ids.
        owner: for the message.

    Raises:
        InputError: names the first difference.
    """
    if names == others:
        return
    # There is a shorter list where all pairs agree.
    pairs = zip([*names, "nothing"], [*others, "nothing"], strict=False)
    i, (name, wanted) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise InputError(
        f"{owner} and {other} have different categories: {len(names)} and {len(others)}, first "
        f"difference at number {i + 1} in the order of their ids: {name!r} and {wanted!r}"
    )


def _find(name: str, *, key: str) -> Metadata:
    metadata = registered(name, key)
    for attribute in _PATHS:
        path = metadata.get(attribute, None)
        # Paths of other schemes (s3://, ...) are PathManager's to find.
        if path and "://" not in path and not os.path.exists(path):
            remedy = "make demo generates it" if is_demo_dataset(name) else "prepare it there"
            raise InputError(
                f"{key}: dataset {name!r} has no {path}; {remedy}, or set "
                "DETECTRON2_DATASETS to the folder that holds your datasets"
            )
    return metadata


def _inspect_coco(cfg: CfgNode, name: str, metadata: Metadata, is_test: bool) -> Inspection:
    path = metadata.json_file
    coco = read_coco(path, needed=("images", "categories") + (() if is_test else ("annotations",)))
    return inspect_coco(coco, path, metadata.image_root, _use(cfg, metadata, is_test))


def _inspect_dicts(cfg: CfgNode, name: str, metadata: Metadata, is_test: bool) -> Inspection:
    """Looks at what a function returns; of classes it tells where it has objects."""
    try:
        records = list(DatasetCatalog.get(name))
    except Exception as error:  # of whoever registered it
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset {name!r} cannot be loaded: {type(error).__name__}: {reason}"
        ) from None
    if not records:
        raise InputError(f"dataset {name!r} is empty: its function returns no dicts")
    use = _use(cfg, metadata, is_test)
    has_objects = any(isinstance(r, Mapping) and r.get("annotations") for r in records)
    classes = metadata.get("thing_classes", None)
    if not isinstance(classes, Sequence) or isinstance(classes, str):
        if has_objects and (use.for_coco or num_classes(cfg) is not None):
            raise InputError(
                f"dataset {name!r} has thing_classes {classes!r}: give the names of its classes, "
                f"MetadataCatalog.get({name!r}).thing_classes = [...], in the order of category_id"
            )
        classes = None
    return inspect_dicts(records, name, classes if has_objects else None, use)


def check_count(cfg: CfgNode, source: str, count: int) -> None:
    """
    Args:
        count: of the categories of a source.

    Raises:
        InputError: the model knows another number of them.
    """
    wanted = num_classes(cfg)
    if wanted is not None and wanted[1] != count:
        raise InputError(
            f"{source} has {count} categories, {wanted[0]} is {wanted[1]}; set {wanted[0]} {count}"
        )


def _use(cfg: CfgNode, metadata: Metadata, is_test: bool) -> Use:
    model, size, lsj = cfg.MODEL, cfg.INPUT, cfg.INPUT.LSJ
    mask_format = num_keypoints = max_aspect = None
    if model.MASK_ON and model.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        mask_format = "bitmask" if is_test else cfg.INPUT.MASK_FORMAT
    if model.KEYPOINT_ON and model.META_ARCHITECTURE == "GeneralizedRCNN":
        num_keypoints = model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    # At which resizing leaves less than half a pixel.
    kind = "TEST" if is_test else "TRAIN"
    if lsj.ENABLED and not is_test:
        max_aspect = 2 * lsj.IMAGE_SIZE * lsj.MIN_SCALE
    elif size[f"MIN_SIZE_{kind}"] not in (0, (0,)):
        max_aspect = 2 * size[f"MAX_SIZE_{kind}"]
    for_coco = is_test and metadata.get("evaluator_type", None) == "coco"
    needs_objects = not is_test and num_classes(cfg) is not None
    skips = cfg.DATALOADER.SKIP_UNREADABLE
    return Use(mask_format, num_keypoints, max_aspect, is_test, for_coco, needs_objects, skips)


def _report(inspection: Inspection, faults_file: Path, *, print_all: bool) -> None:
    """Writes and prints what was found, and raises where that stops a run."""
    if inspection.faults:
        faults_file.parent.mkdir(parents=True, exist_ok=True)
        with faults_file.open("a", encoding="utf-8") as file:
            print(inspection.describe(), *inspection.faults, sep="\n    ", file=file)
    if inspection.fatal:
        reasons = "; ".join(inspection.describe_faults(inspection.fatal))
        raise InputError(
            f"{inspection.source} has faults that stop the run, {reasons}; all "
            f"{len(inspection.faults)} faults are listed in {faults_file}"
        )
    if inspection.faults or print_all:
        print(inspection.describe(), flush=True)

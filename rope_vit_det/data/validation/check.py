"""Looking at a dataset before a run depends on it."""

import difflib
import importlib.util
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ...errors import InputError
from ..classes import num_classes
from ..coco_file import read_coco
from ..demo.dataset import is_demo_dataset
from ..own import own_datasets
from .faults import Inspection
from .inspection import inspect_coco, inspect_files

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
# What Detectron2 imports to read a dataset, by its evaluator_type.
_PACKAGES = {
    "lvis": "lvis",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> list[str] | None:
    """Checks that the datasets are there, are what they say, and fit the model and each other.

    What is wrong is printed, and every fault is listed in OUTPUT_DIR.

    Args:
        eval_only: the training sets are not needed.

    Returns:
        The class names, where a dataset in COCO's format says them.

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
            if metadata.get("evaluator_type", None) != "coco" or not json_file:
                _check_files(cfg, name, faults_file, is_test)
            elif "://" not in json_file:
                classes[name] = _check_coco(cfg, name, metadata, faults_file, is_test)
    first = next(iter(classes), None)
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
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "register it in DatasetCatalog first"
        raise InputError(f"{key}: no dataset is registered as {name!r}; {hint}")
    metadata = MetadataCatalog.get(name)
    package = _PACKAGES.get(metadata.get("evaluator_type", None))
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"{key}: dataset {name!r} cannot be read without the package {package}; "
            f"pip install {package}"
        )
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


def _check_coco(
    cfg: CfgNode, name: str, metadata: Metadata, faults_file: Path, is_test: bool
) -> list[str]:
    path = metadata.json_file
    coco = read_coco(path, needed=("images", "categories") + (() if is_test else ("annotations",)))
    masks = cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    inspection = inspect_coco(
        coco,
        path,
        metadata.image_root,
        mask_format=cfg.INPUT.MASK_FORMAT if masks else None,
        max_aspect=_max_aspect(cfg, is_test),
        is_test=is_test,
    )
    _report(cfg, inspection, faults_file, print_all=name in own_datasets(cfg))
    wanted = num_classes(cfg)
    if wanted is not None and wanted[1] != len(coco["categories"]):
        raise InputError(
            f"{path} has {len(coco['categories'])} categories, {wanted[0]} is {wanted[1]}; "
            f"set {wanted[0]} {len(coco['categories'])}"
        )
    return [each["name"] for each in sorted(coco["categories"], key=lambda each: each["id"])]


def _check_files(cfg: CfgNode, name: str, faults_file: Path, is_test: bool) -> None:
    """Looks at the images of a dataset that is not a JSON file of COCO's."""
    try:
        records = DatasetCatalog.get(name)
    except Exception as error:  # of whoever registered it
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset {name!r} cannot be loaded: {type(error).__name__}: {reason}"
        ) from None
    images = [
        {"id": record.get("image_id"), **record}
        for record in records
        if "://" not in str(record.get("file_name", "://"))
    ]
    inspection = Inspection(
        source=f"dataset {name!r}",
        images=len(records),
        unannotated=0,
        objects=sum(len(record.get("annotations", ())) for record in records),
        categories=0,
        faults=inspect_files(images, "", _max_aspect(cfg, is_test)),
    )
    _report(cfg, inspection, faults_file, print_all=False)


def _max_aspect(cfg: CfgNode, is_test: bool) -> float | None:
    """The longer side over the shorter one at which resizing leaves less than half a pixel."""
    lsj = cfg.INPUT.LSJ
    if lsj.ENABLED and not is_test:
        return 2 * lsj.IMAGE_SIZE * lsj.MIN_SCALE
    kind = "TEST" if is_test else "TRAIN"
    resizes = cfg.INPUT[f"MIN_SIZE_{kind}"] not in (0, (0,))
    return 2 * cfg.INPUT[f"MAX_SIZE_{kind}"] if resizes else None


def _report(cfg: CfgNode, inspection: Inspection, faults_file: Path, *, print_all: bool) -> None:
    """Writes and prints what was found, and raises where that stops a run."""
    if cfg.DATALOADER.SKIP_UNREADABLE:  # see data/readable.py
        inspection = inspection.with_skipped_images()
    if inspection.faults:
        faults_file.parent.mkdir(parents=True, exist_ok=True)
        with faults_file.open("a", encoding="utf-8") as file:
            print(inspection.describe(), file=file)
            for fault in inspection.faults:
                print(f"    {fault}", file=file)
    if inspection.fatal:
        reasons = "; ".join(inspection.describe_faults(inspection.fatal))
        raise InputError(
            f"{inspection.source} has faults that stop the run, {reasons}; all "
            f"{len(inspection.faults)} faults are listed in {faults_file}"
        )
    if inspection.faults or print_all:
        print(inspection.describe(), flush=True)

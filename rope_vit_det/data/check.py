"""Looking at a dataset before a run depends on it."""

import difflib
import json
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..errors import InputError

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


def check_dataset(cfg: CfgNode, name: str, *, key: str) -> None:
    """Checks that a registered dataset is there, is what it says, and fits the model.

    Args:
        name: as registered in Detectron2's `DatasetCatalog`.
        key: the config key that names it, for the messages.

    Raises:
        InputError: names the dataset, the file and the remedy.
    """
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "register it in DatasetCatalog first"
        raise InputError(f"{key}: no dataset is registered as {name!r}; {hint}")
    metadata = MetadataCatalog.get(name)
    for attribute in _PATHS:
        path = metadata.get(attribute, None)
        # Paths of other schemes (s3://, ...) are PathManager's to find.
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{key}: dataset {name!r} has no {path}; prepare it there, or set "
                "DETECTRON2_DATASETS to the folder that holds your datasets"
            )
    if metadata.get("evaluator_type", None) == "coco" and "://" not in metadata.json_file:
        _check_coco(cfg, metadata)


def _check_coco(cfg: CfgNode, metadata: Metadata) -> None:
    path = metadata.json_file
    try:
        with open(path, encoding="utf-8") as file:
            coco = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    for field in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list):
            raise InputError(
                f"{path} is not COCO instance annotation: it has no list {field!r}; see "
                "https://cocodataset.org/#format-data"
            )
    _check_images(path, metadata.image_root, coco["images"])
    wanted = _num_classes(cfg)
    if wanted is not None and wanted[1] != len(coco["categories"]):
        raise InputError(
            f"{path} has {len(coco['categories'])} categories, {wanted[0]} is {wanted[1]}; "
            f"set {wanted[0]} {len(coco['categories'])}"
        )


def _check_images(json_file: str, image_root: str, images: list[dict]) -> None:
    try:
        names = [image["file_name"] for image in images]
    except (KeyError, TypeError):
        raise InputError(f"{json_file}: an entry of 'images' has no 'file_name'") from None
    # One listing instead of 118,000 questions to a network disk.
    present = set(os.listdir(image_root))
    missing = [
        name
        for name in names
        if name not in present and not os.path.exists(os.path.join(image_root, name))
    ]
    if missing:
        raise InputError(
            f"{json_file} names {len(missing)} of {len(names)} images that {image_root} lacks, "
            f"first {missing[0]!r}; put them there, or take them out of the JSON"
        )


def _num_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """The key and value by which the model knows how many categories there are, if it does."""
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    return None

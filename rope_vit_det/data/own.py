"""A user's own data in COCO's format: from paths to registered datasets and a config that fits."""

import os
from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import InputError
from .coco_file import read_coco
from .demo.dataset import register_where_named

TRAIN, VAL = "own_train", "own_val"
# Of what COCO's instance annotations do not hold.
_NO_INSTANCES = ("SemanticSegmentor", "PanopticFPN", "PanopticDeepLab")


def own_datasets(cfg: CfgNode) -> dict[str, tuple[str, str]]:
    """Name to (JSON file, image folder) of the datasets that DATASETS.OWN describes."""
    own = cfg.DATASETS.OWN
    paths = {TRAIN: (own.TRAIN_JSON, own.TRAIN_IMAGES), VAL: (own.VAL_JSON, own.VAL_IMAGES)}
    return {name: pair for name, pair in paths.items() if any(pair)}


def register_own_data(cfg: CfgNode) -> None:
    """Registers what DATASETS.OWN describes, in place of what bore the names before.

    The demo's dataset as well, where DATASETS.TRAIN or TEST names it.
    """
    register_where_named((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    for name, (json_file, images) in own_datasets(cfg).items():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, json_file, images)


def use_own_data(cfg: CfgNode, *, eval_only: bool = False, options: Collection[str] = ()) -> None:
    """Makes a config one for the data of DATASETS.OWN: DATASETS.TRAIN and TEST, and NUM_CLASSES.

    Args:
        cfg: changed in place; left alone where DATASETS.OWN is empty.
        eval_only: the training data may lie elsewhere.
        options: keys of DATASETS.OWN that the command line gave, for the messages.

    Raises:
        InputError: a path is missing, or the model cannot learn from instances.
    """
    datasets = own_datasets(cfg)
    if not datasets:
        return
    needed = {name: pair for name, pair in datasets.items() if name == VAL or not eval_only}
    for name, (json_file, images) in datasets.items():
        split = name.removeprefix("own_").upper()
        keys = (f"{split}_JSON", f"{split}_IMAGES")
        given = not set(options).isdisjoint(keys)
        for key, path, kind in zip(keys, (json_file, images), ("file", "folder"), strict=True):
            place = f"--{key.lower().replace('_', '-')}" if given else f"DATASETS.OWN.{key}"
            if not path:
                raise InputError(f"{place} is missing beside its other half")
            exists = os.path.isfile if kind == "file" else os.path.isdir
            if name in needed and not exists(path):
                raise InputError(f"{place} {path}: no such {kind}")
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _NO_INSTANCES:
        raise InputError(
            f"MODEL.META_ARCHITECTURE {architecture} learns from pixel maps, which COCO's instance "
            "annotations do not hold; take a config of a detector, or register your dataset"
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise InputError(
            "MODEL.KEYPOINT_ON needs to know which keypoints change places in a mirrored image, "
            "which COCO's format does not say; register your dataset with keypoint_flip_map"
        )
    cfg.DATASETS.TRAIN = (TRAIN,) if TRAIN in datasets else cfg.DATASETS.TRAIN
    cfg.DATASETS.TEST = (VAL,) if VAL in datasets else ()
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    if not needed:
        return  # there is nothing to evaluate on either, which the check of TEST says
    json_file, _ = next(iter(needed.values()))
    count = len(read_coco(json_file, needed=("categories",))["categories"])
    if not count:
        raise InputError(f"{json_file} has no categories: its list 'categories' is empty")
    for head in ("ROI_HEADS", "RETINANET", "POINT_HEAD"):
        if head in cfg.MODEL:  # the last one is PointRend's
            cfg.MODEL[head].NUM_CLASSES = count

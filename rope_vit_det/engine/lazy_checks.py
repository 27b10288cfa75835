"""The checks of yaml configs, for LazyConfigs."""

import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigTypeError

from ..config import AMP_DTYPES, add_rope_vit_config
from ..errors import InputError
from .setup import check_data, check_weights

# What the checks read of a yaml config: where it stands in a LazyConfig.
_KEYS = {
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.ROPE_VIT.CHECK_WEIGHTS": "train.check_weights",
    "MODEL.ROPE_VIT.IMAGE_SIZE": "model.backbone.net.image_size",
    "MODEL.ROPE_VIT.NAME": "model.backbone.net.name",
    "MODEL.ROPE_VIT.PT_GRID_SIZE": "model.backbone.net.pt_grid_size",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "OUTPUT_DIR": "train.output_dir",
}


def check_lazy_config(cfg: DictConfig, *, eval_only: bool = False, resume: bool = False) -> None:
    """Checks, within seconds, what would otherwise end a run later: weights and datasets.

    Args:
        eval_only: the training set is not needed.
        resume: a checkpoint in train.output_dir takes the place of train.init_checkpoint.

    Raises:
        InputError: names the key or file, and the remedy.
    """
    dtype = cfg.train.amp.get("dtype", "bfloat16")
    if dtype not in AMP_DTYPES:
        raise InputError(f"train.amp.dtype is {dtype!r}; allowed: {', '.join(AMP_DTYPES)}")
    if cfg.train.amp.enabled and dtype == "float16" and cfg.train.device == "cpu":
        raise InputError("train.amp.dtype float16 needs a GPU; on the CPU use bfloat16")
    view = _as_yaml(cfg)
    # A split whose loader is not Detectron2's is its author's to check.
    splits = ("test",) if eval_only else ("train", "test")
    try:
        check_weights(view, eval_only=eval_only, resume=resume)
        if all(dataset_names(cfg, split) for split in splits):
            check_data(view, eval_only=eval_only, resume=resume)
    except InputError as error:
        raise InputError(_with_lazy_keys(str(error))) from None


def dataset_names(cfg: DictConfig, split: str) -> tuple[str, ...]:
    """The registered datasets of a split; none where its loader is not Detectron2's.

    Args:
        split: "train" or "test".
    """
    names = _select(cfg, f"dataloader.{split}.dataset.names")
    return (names,) if isinstance(names, str) else tuple(names or ())


def _as_yaml(cfg: DictConfig) -> CfgNode:
    """What a yaml config of the same run would say, as far as the checks read it."""
    view = get_cfg()
    add_rope_vit_config(view)
    for key, place in _KEYS.items():
        value = _select(cfg, place)
        if value is not None:
            *parts, last = key.split(".")
            node = view
            for part in parts:
                node = node[part]
            node[last] = _plain(value)
    view.DATASETS.TRAIN = dataset_names(cfg, "train")
    view.DATASETS.TEST = dataset_names(cfg, "test")
    view.MODEL.DEVICE = cfg.train.device
    if _select(cfg, "model.backbone.net.name") is not None:
        view.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone"
    if _select(cfg, "model.roi_heads.num_classes") is None:
        known = _select(cfg, "model.num_classes") is not None
        view.MODEL.META_ARCHITECTURE = "RetinaNet" if known else "unknown"
    return view


def _select(cfg: DictConfig, place: str) -> Any:
    try:
        return OmegaConf.select(cfg, place)
    except ConfigTypeError:
        return None  # a list where Detectron2's configs have keys


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, ListConfig) else value


def _with_lazy_keys(message: str) -> str:
    longest_first: Sequence[str] = sorted(_KEYS, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda key: _KEYS[key[0]], message)

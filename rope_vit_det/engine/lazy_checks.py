"""The checks of yaml configs, for LazyConfigs."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigTypeError

from ..checkpoint.checkpoint_files import resumable_checkpoint
from ..checkpoint.checkpointer import check_weights_path
from ..config.keys import AMP_DTYPES, add_rope_vit_config
from ..config.use import disagreement
from ..errors import InputError
from ..models.variants import VARIANTS
from ..weights.detector import LAZY_NAMES
from ..weights.detectron2_format import read_info
from ..weights.load import PREFIX, as_birder_url
from .setup import check_data

# By where the number of classes stands.
_ARCHITECTURES = {"ROI_HEADS": "GeneralizedRCNN", "RETINANET": "RetinaNet"}
# What messages name of a yaml config: where it stands in a LazyConfig.
_KEYS = {
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
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
    if not (resume and resumable_checkpoint(cfg.train.output_dir)):
        weights = cfg.train.init_checkpoint
        try:
            check_weights_path(weights, for_rope_vit=False)  # the load knows the model
            if cfg.train.get("check_weights", True):
                _check_agreement(cfg)
        except InputError as error:
            raise InputError(f"train.init_checkpoint {weights}: {error}") from None
        if eval_only and not weights:
            raise InputError("--eval-only needs train.init_checkpoint, or --resume")
    # A split whose loader is not Detectron2's is its author's to check.
    splits = ("test",) if eval_only else ("train", "test")
    if all(dataset_names(cfg, split) for split in splits):
        try:
            check_data(_as_yaml(cfg), eval_only=eval_only, resume=resume)
        except InputError as error:
            raise InputError(_with_lazy_keys(str(error))) from None


def dataset_names(cfg: DictConfig, split: str) -> tuple[str, ...]:
    """The registered datasets of a split; none where its loader is not Detectron2's.

    Args:
        split: "train" or "test".
    """
    names = _select(cfg, f"dataloader.{split}.dataset.names")
    return (names,) if isinstance(names, str) else tuple(names or ())


def _check_agreement(cfg: DictConfig) -> None:
    """Refuses weights of birder's that were trained with other input than the config describes."""
    weights = as_birder_url(cfg.train.init_checkpoint)
    settings = {key: _select(cfg, name) for key, name in LAZY_NAMES.items()}
    if not weights.startswith(PREFIX) or settings["MODEL.ROPE_VIT.NAME"] not in VARIANTS:
        return
    # Other models than Detectron2's may have their pixel statistics elsewhere.
    stated = {k: v for k, v in settings.items() if v is not None or ".ROPE_VIT." in k}
    problem = disagreement(stated, read_info(weights), _as_overrides)
    if problem:
        raise InputError(
            f"these weights were trained with other settings than the config has; {problem}; or "
            "set train.check_weights=False to go on all the same"
        )


def _as_overrides(settings: Mapping[str, Any]) -> str:
    """Settings as `key=value` on the command line."""
    pairs = (f"{LAZY_NAMES[key]}={value}".replace(", ", ",") for key, value in settings.items())
    return shlex.join(pairs)


def _as_yaml(cfg: DictConfig) -> CfgNode:
    """What a yaml config of the same run would say, as far as the checks read it."""
    view = get_cfg()
    add_rope_vit_config(view)
    view.OUTPUT_DIR, view.MODEL.WEIGHTS = cfg.train.output_dir, cfg.train.init_checkpoint
    view.DATASETS.TRAIN = dataset_names(cfg, "train")
    view.DATASETS.TEST = dataset_names(cfg, "test")
    mapper = _select(cfg, "dataloader.train.mapper") or {}
    view.MODEL.MASK_ON = bool(mapper.get("use_instance_mask"))
    view.INPUT.MASK_FORMAT = mapper.get("instance_mask_format", "polygon")
    for key, architecture in _ARCHITECTURES.items():
        classes = _select(cfg, _KEYS[f"MODEL.{key}.NUM_CLASSES"])
        if classes is not None:
            view.MODEL[key].NUM_CLASSES, view.MODEL.META_ARCHITECTURE = classes, architecture
            return view
    view.MODEL.META_ARCHITECTURE = "unknown"
    return view


def _select(cfg: DictConfig, place: str) -> Any:
    try:
        return OmegaConf.select(cfg, place)
    except ConfigTypeError:
        return None  # a list where Detectron2's configs have keys


def _with_lazy_keys(message: str) -> str:
    return re.sub("|".join(map(re.escape, _KEYS)), lambda key: _KEYS[key[0]], message)

"""The backbone of a trained detector as a whole network of birder's."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..errors import InputError
from ..layers.lora import merge_state
from ..models.variants import VARIANTS, default_image_size
from ..utils.arguments import to_pair
from .adapters import plain_state
from .birder import misfit
from .detectron2_format import BACKBONE, info_from_metadata
from .info import HEAD_PREFIXES, WeightsInfo
from .load import read_weights
from .safe import check_finite, load_torch_file

# What a run of Detectron2's writes beside its checkpoints.
RUN_CONFIG = "config.yaml"
# Statistics in a run's config are rounded; a file's own, where they are that close, are exact.
_ROUNDING = 1e-4

# Keys of yaml configs, and where a LazyConfig of this project has what they say.
LAZY_NAMES = {
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.DEVICE": "train.device",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "model.roi_heads.keypoint_head.num_keypoints",
    "MODEL.ROPE_VIT.CHECK_WEIGHTS": "train.check_weights",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "OUTPUT_DIR": "train.output_dir",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "TEST.KEYPOINT_OKS_SIGMAS": "dataloader.evaluator.kpt_oks_sigmas",
    "INPUT.FORMAT": "model.input_format",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.ROPE_VIT.NAME": "model.backbone.net.name",
    "MODEL.ROPE_VIT.DTYPE": "model.backbone.net.dtype",
    "MODEL.ROPE_VIT.IMAGE_SIZE": "model.backbone.net.image_size",
    "MODEL.ROPE_VIT.PT_GRID_SIZE": "model.backbone.net.pt_grid_size",
}


def read_detector(
    path: str | os.PathLike[str],
    *,
    network: str | None = None,
    head_from: str | None = None,
    config_file: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Tensor], WeightsInfo, list[str]]:
    """The backbone of a Detectron2 checkpoint, made whole by a head.

    A checkpoint does not say which network it has and on what pixels it was trained: that comes
    from the config of its run, from what was converted to it, or else from the file of the head.

    Args:
        path: a `.pth`, of a whole detector or of a backbone alone.
        network: the architecture, where none of these says it.
        head_from: a published name or a file of birder's whose final norm, pooling and classifier
            are taken, with its classes. None: a norm that only normalises, pooling with random
            weights, and no classes.
        config_file: the `config.yaml` of the run; None: the one in the checkpoint's folder.

    Returns:
        State dict (birder's keys), info, and lines that say what the head is.

    Raises:
        InputError: the file is missing, damaged, no detector's, has another network than the
            others say, or would run code; nothing says what the network is.
    """
    path = Path(path)
    state, info = _read_backbone(path)
    head = None if head_from is None else read_weights(head_from)
    beside = path.with_name(RUN_CONFIG)
    if config_file is None and info is None and beside.is_file():
        config_file = beside
    if config_file is not None:
        info = info_of_run_config(config_file)
    if info is None and head is not None:
        info = head[1]
    if info is None:
        raise InputError(
            f"{path} does not say which network it has and on what pixels it was trained; give "
            f"--config-file with the {RUN_CONFIG} of its run, or --head-from with the weights that "
            "it was trained from"
        )
    if network not in (None, info.network):
        if info.network:
            raise InputError(f"{path} is a {info.network}, not a {network}")
        info = replace(info, network=network)
    if not info.network:
        raise InputError(f"{path} does not say which network it has; give --network")
    if head is None:
        info = replace(info, num_classes=0, class_to_idx={})
        head_state = info.build().state_dict()
    else:
        head_state, head_info = head
        if head_info.network != info.network:
            raise InputError(
                f"--head-from {head_from} is a {head_info.network}, and {path} a {info.network}"
            )
        info = _with_head(info, head_info)
    head_state = {key: t for key, t in head_state.items() if key.startswith(HEAD_PREFIXES)}
    state |= head_state
    problem = misfit(state, info)
    if problem:
        raise InputError(f"{path} has not the backbone tensors of {info.network}: {problem}")
    return state, info, _notes(head_state, head_from)


def info_of_run_config(path: str | os.PathLike[str]) -> WeightsInfo:
    """What the `config.yaml` of a run, of yaml configs or of a LazyConfig, says of its backbone.

    Raises:
        InputError: the file is missing, no yaml, or not of a run with a RoPE ViT.
    """
    try:
        root = yaml.compose(Path(path).read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path} is not yaml") from None
    settings = {key: _entry(root, key) for key in LAZY_NAMES}
    if settings["MODEL.ROPE_VIT.NAME"] is None:
        settings = {key: _entry(root, name) for key, name in LAZY_NAMES.items()}
    if settings["MODEL.ROPE_VIT.NAME"] not in VARIANTS:
        raise InputError(f"{path} is no config of a run with a RoPE ViT")
    try:
        return _info_of_run(settings)
    except (TypeError, ValueError):
        raise InputError(f"{path} is damaged: get the config of the run again") from None


def _info_of_run(settings: Mapping[str, Any]) -> WeightsInfo:
    network, pt_grid_size, image_size = (
        settings[f"MODEL.ROPE_VIT.{key}"] for key in ("NAME", "PT_GRID_SIZE", "IMAGE_SIZE")
    )
    height, width = to_pair(default_image_size(network) if image_size is None else image_size)
    order = -1 if settings["INPUT.FORMAT"] == "BGR" else 1
    mean, std = (
        tuple(round(value / 255, 6) for value in settings[f"MODEL.PIXEL_{key}"][::order])
        for key in ("MEAN", "STD")
    )
    default = VARIANTS[network].get("default_pt_grid_size")
    config: dict[str, Any] = {}
    if pt_grid_size == "count":
        config = {} if default is None else {"pt_grid_size": None}
    elif pt_grid_size is not None and tuple(pt_grid_size) != default:
        config = {"pt_grid_size": list(pt_grid_size)}
    return WeightsInfo(
        network=network,
        tag=None,
        num_classes=0,
        class_to_idx={},
        image_size=(int(height), int(width)),
        rgb_mean=mean,
        rgb_std=std,
        config=config,
    )


def _entry(node: yaml.Node | None, name: str) -> Any:
    """The value at a dotted name, of builtins; None where there is none. Nothing else is built."""
    for part in name.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for key, value in entries if key.value == part), None)
    with suppress(yaml.YAMLError):
        return node and yaml.SafeLoader("").construct_object(node, deep=True)
    return None


def _read_backbone(path: Path) -> tuple[dict[str, Tensor], WeightsInfo | None]:
    tensors, metadata = plain_state(load_torch_file(path))
    prefix = f"{BACKBONE}."
    state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    if not state:
        raise InputError(f"{path} is no checkpoint of a RoPE ViT detector: it has no {BACKBONE}.*")
    check_finite(path, state.items())
    state = merge_state(state)
    found = info_from_metadata(metadata.get(BACKBONE, {}))
    return state, found and found[0]


def _with_head(info: WeightsInfo, head: WeightsInfo) -> WeightsInfo:
    """The info of a backbone with the classes, and whatever else concerns it, of a head."""
    config = {key: value for key, value in head.config.items() if key != "pt_grid_size"}
    pairs = zip(info.rgb_mean + info.rgb_std, head.rgb_mean + head.rgb_std, strict=True)
    same = all(abs(ours - exact) <= _ROUNDING for ours, exact in pairs)
    return replace(
        info,
        num_classes=head.num_classes,
        class_to_idx=head.class_to_idx,
        config=config | dict(info.config),
        rgb_mean=head.rgb_mean if same else info.rgb_mean,
        rgb_std=head.rgb_std if same else info.rgb_std,
    )


def _notes(head_state: Mapping[str, Tensor], head_from: str | None) -> list[str]:
    if head_from is not None:
        return [f"final norm, pooling and classifier are those of {head_from}"]
    missing = ["no classes"]
    if any(key.startswith("attn_pool.") for key in head_state):
        missing.insert(0, "random attention pooling")
    if any(key.startswith("norm.") for key in head_state):
        missing.insert(0, "a final norm of weight 1 and bias 0")
    return [
        f"a detector has no head: the file has {', '.join(missing)}; --head-from FILE takes them "
        "from a file of birder's"
    ]

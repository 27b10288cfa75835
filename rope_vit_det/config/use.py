"""Configs and the weights they name: filling one from the other, and comparing them."""

import logging
import math
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from ..models.variants import VARIANTS, check_network
from ..pyramids import BACKBONES, pyramid_for_heads
from ..utils.arguments import to_pair
from ..weights.info import DEFAULTS, WeightsInfo, architecture_from_config
from ..weights.load import PREFIXES, as_birder_url, birder_url, locate, published_url, read_weights
from .keys import add_rope_vit_config, get_key, set_keys

logger = logging.getLogger(__name__)

# Gray levels of 255 by which a mean or deviation may differ: it may have been rounded.
_TOLERANCE = 0.5
# Regularisation is the new training's, the grid has its key, and a detector has no final norm and
# pooling.
_NOT_COMPARED = (
    "default_pt_grid_size",
    "drop_path_rate",
    "norm_pooled",
    "pooling",
    "post_norm",
    "attn_pool_num_heads",
    "attn_pool_special_tokens",
)
_COMPARED = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.ROPE_VIT.NAME",
    "MODEL.ROPE_VIT.IMAGE_SIZE",
    "MODEL.ROPE_VIT.PT_GRID_SIZE",
)


def use_rope_vit(
    cfg: CfgNode,
    weights: str | os.PathLike[str] | None = None,
    *,
    network: str | None = None,
    solver: bool = True,
) -> None:
    """Turns a loaded config with a feature pyramid into one of ours, in place.

    It sets MODEL.BACKBONE.NAME (the pyramid that has what the heads read: p2 to p6, p3 to p7 or
    res2 to res5) and FREEZE_AT (0: it counts a ResNet's stages), MODEL.WEIGHTS,
    MODEL.ROPE_VIT.NAME and IMAGE_SIZE (PT_GRID_SIZE too, where the file has one), MODEL.PIXEL_MEAN
    and PIXEL_STD, and INPUT.FORMAT; and SOLVER, see :func:`solver_settings`. The statistics stand
    in the weights file alone, so published weights that are not in the cache are downloaded. Keys
    of this project that the config lacks are added.

    Args:
        cfg: a config of Detectron2's, `merge_from_file` and all done.
        weights: a published name, a file of birder's, timm's or a publisher's, or either as
            `birder://NAME`, `timm://NAME`, `birder:/path` and `timm:/path`; a Detectron2
            checkpoint of a whole detector sets MODEL.WEIGHTS alone. None: random weights, and
            pixels as the config has them.
        network: the architecture in a file whose name does not say, or without weights.
        solver: False leaves SOLVER as it is. In one's own trainer, its values are for the optimizer
            of :func:`rope_vit_det.build_optimizer`.

    Raises:
        InputError: the config has no feature pyramid; the weights cannot be had.
    """
    # What can fail comes first, so that a config is changed wholly or not at all.
    name = cfg.MODEL.BACKBONE.NAME
    name = name if name in BACKBONES else pyramid_for_heads(cfg)
    settings = {"MODEL.BACKBONE.NAME": name, "MODEL.BACKBONE.FREEZE_AT": 0}
    weights = os.fspath(weights or "")
    if network is not None:
        check_network(network)
        settings["MODEL.ROPE_VIT.NAME"] = network
    of_detectron2 = weights.endswith((".pth", ".pkl"))
    if not weights or (of_detectron2 and not as_birder_url(weights).startswith(PREFIXES)):
        settings["MODEL.WEIGHTS"] = weights
    else:
        path, published = locate(weights)
        # Of the tensors, which are read to see whether they fit, in half the memory.
        _, info = read_weights(weights, network=network, dtype=torch.bfloat16)
        settings |= settings_for(info)
        settings["MODEL.WEIGHTS"] = published_url(published) if published else birder_url(str(path))
    frozen = cfg.is_frozen()
    cfg.defrost()
    add_rope_vit_config(cfg)
    set_keys(cfg, settings)
    if solver:
        settings = solver_settings(cfg)
        set_keys(cfg, settings)
        # A warning, as a script's loggers are seldom set up before its config is.
        logger.warning(
            "use_rope_vit has set %s, for batches of %d images (solver=False leaves SOLVER alone)",
            as_arguments(settings),
            cfg.SOLVER.IMS_PER_BATCH,
        )
    if frozen:
        cfg.freeze()


def solver_settings(cfg: CfgNode) -> dict[str, Any]:
    """SOLVER's keys as the recipes have them, and their values, for the batch of a config.

    Schedule, clipping and precision stay the config's. Pretrained weights are tuned as ViTDet tunes
    its ViT-B (arXiv 2203.16527, appendix A.2): 1e-4 for 64 images, which the square root of the
    batch scales, as Adam wants it (arXiv 2205.10287). Random weights learn at the demo's rate (6e-4
    at a width of 192, whatever the batch), in inverse proportion to the network's width (arXiv
    2203.03466), in all layers.

    Args:
        cfg: with MODEL.WEIGHTS, MODEL.ROPE_VIT.NAME and SOLVER.IMS_PER_BATCH set.
    """
    if cfg.MODEL.WEIGHTS:
        rate, layer_decay = 1e-4 * math.sqrt(cfg.SOLVER.IMS_PER_BATCH / 64), 0.7
    else:
        rate, layer_decay = 6e-4 * 192 / VARIANTS[cfg.MODEL.ROPE_VIT.NAME]["hidden_dim"], 1.0
    return {
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": float(f"{rate:.3g}"),
        "SOLVER.WEIGHT_DECAY": 0.1,
        "SOLVER.LAYER_DECAY": layer_decay,
        "SOLVER.WARMUP_ITERS": 250,
        "SOLVER.WARMUP_FACTOR": 0.001,
    }


def settings_for(info: WeightsInfo) -> dict[str, Any]:
    """The config keys that weights decide, and their values."""
    height, width = info.image_size
    settings = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in info.rgb_mean],
        "MODEL.PIXEL_STD": [round(255 * value, 3) for value in info.rgb_std],
        "MODEL.ROPE_VIT.IMAGE_SIZE": height if height == width else [height, width],
    }
    if info.network:
        settings["MODEL.ROPE_VIT.NAME"] = info.network
    if "pt_grid_size" in info.config:
        grid = info.config["pt_grid_size"]
        settings["MODEL.ROPE_VIT.PT_GRID_SIZE"] = "count" if grid is None else list(grid)
    return settings


def compared_settings(cfg: CfgNode) -> dict[str, Any]:
    """The values that a config has for the keys that weights decide.

    Pixels that are None, as a LazyConfig's may be, are left out.
    """
    settings = {key: get_key(cfg, key) for key in _COMPARED}
    return {k: v for k, v in settings.items() if v is not None or ".ROPE_VIT." in k}


def as_arguments(settings: Mapping[str, Any]) -> str:
    """KEY VALUE pairs as a command line takes them."""
    return " ".join(f"{key} {shlex.quote(str(value))}" for key, value in settings.items())


def disagreement(
    settings: Mapping[str, Any],
    info: WeightsInfo,
    spell: Callable[[Mapping[str, Any]], str] = as_arguments,
) -> str | None:
    """What must be changed in a config before weights fit it; None: nothing.

    Args:
        settings: of the config, from :func:`compared_settings`; what it lacks is not compared.
        spell: writes settings as the user would.
    """
    network = settings["MODEL.ROPE_VIT.NAME"]
    own = DEFAULTS | VARIANTS.get(network, {})
    meant_by_none = {
        "MODEL.ROPE_VIT.IMAGE_SIZE": own["image_size"],
        "MODEL.ROPE_VIT.PT_GRID_SIZE": own["default_pt_grid_size"] or "count",
    }
    wrong = {}
    for key, wanted in settings_for(info).items():
        given = settings.get(key, wanted)
        if not _agree(key, meant_by_none.get(key) if given is None else given, wanted):
            wrong[key] = wanted
    reasons = [f"set {spell(wrong)}"] if wrong else []
    for key, value in architecture_from_config(info.config, network).items():
        if key not in _NOT_COMPARED and value != own[key]:
            reasons.append(
                f"they have {key} {value!r}, {network} has {own[key]!r}, and no key sets it"
            )
    return "; ".join(reasons) or None


def _agree(key: str, given: Any, wanted: Any) -> bool:
    if key.startswith("MODEL.PIXEL_"):
        return len(given) == len(wanted) and np.allclose(given, wanted, rtol=0, atol=_TOLERANCE)
    return to_pair(given) == to_pair(wanted)

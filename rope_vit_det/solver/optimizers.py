"""AdamW with layer-wise learning-rate decay over the blocks of the backbone."""

import logging
import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

logger = logging.getLogger(__name__)

HIGHEST_USUAL_LR = 1e-3
_BLOCK = re.compile(r"backbone\.net\.encoder\.block\.(\d+)\.")
_TOKENS = ("class_token", "reg_tokens", "pos_embedding")


def layer_decay_factor(name: str, decay: float, num_layers: int) -> float:
    """The factor on a parameter's learning rate (BEiT, arXiv 2106.08254; as ViTDet applies it).

    Stem, special tokens and position table are layer 0, block i is layer i + 1; the pyramid and
    the heads learn at the full rate.

    Args:
        name: of the parameter, in the detector.
        decay: rate of a layer relative to the next one.
        num_layers: blocks of the backbone.
    """
    block = _BLOCK.match(name)
    if block:
        layer = int(block[1]) + 1
    else:
        layer = 0 if name.startswith("backbone.net.") else num_layers + 1
    return decay ** (num_layers + 1 - layer)


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """False for norms, biases and scales (one dimension), special tokens and position table."""
    return parameter.dim() > 1 and name.rpartition(".")[2] not in _TOKENS


def parameter_groups(
    model: nn.Module, *, base_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters of a detector, grouped for an optimizer by rate and weight decay.

    Args:
        model: whose `backbone.net` is a RoPE ViT; without one, every layer learns at `base_lr`.
        base_lr: of pyramid and heads; the network's layers learn at a share of it.
        layer_decay: see :func:`layer_decay_factor`.
    """
    net = getattr(model.backbone, "net", None)
    num_layers = len(net.encoder.block) if hasattr(net, "encoder") else 0
    return reduce_param_groups(
        [
            {
                "params": [parameter],
                "lr": base_lr * layer_decay_factor(name, layer_decay, num_layers),
                "weight_decay": weight_decay if has_weight_decay(name, parameter) else 0.0,
            }
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
    )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, with SOLVER's rate, decay, layer decay and clipping.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be "full_model" besides Detectron2's "value" and "norm",
    which clip each gradient alone: the norm of all gradients together is clipped.
    """
    groups = parameter_groups(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        layer_decay=cfg.SOLVER.LAYER_DECAY,
    )
    if cfg.SOLVER.BASE_LR > HIGHEST_USUAL_LR:
        logger.warning(
            "SOLVER.BASE_LR is %g: usual for SGD, high for the AdamW used here (ViTDet: 0.0001)",
            cfg.SOLVER.BASE_LR,
        )
    optimizer = torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        _clip_norm_of_all(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def _clip_norm_of_all(optimizer: torch.optim.Optimizer, most: float, norm_type: float) -> None:
    """Scales the gradient as a whole, which Detectron2 leaves to its projects ("full_model")."""

    def clip(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, most, norm_type)

    optimizer.register_step_pre_hook(clip)

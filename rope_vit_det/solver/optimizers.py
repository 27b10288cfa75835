"""Optimizers by name, over groups with layer-wise learning-rate decay and without undue decay."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import reduce_param_groups
from fvcore.common.registry import Registry
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..config.keys import check_optimizer_config, warn_of_high_rate
from ..errors import InputError, did_you_mean
from ..models import RoPEViT
from ..utils.torch_private import clip_each_norm
from ..weights.safe import COMPILED

BLOCK = re.compile(r"backbone\.net\.encoder\.block\.(\d+)\.")
_NO_DECAY = ("class_token", "reg_tokens", "pos_embedding", "frequencies")

OPTIMIZERS = Registry("OPTIMIZERS")
"""What SOLVER.OPTIMIZER may name: functions (cfg, groups, model) to an optimizer.

The groups are those of :func:`parameter_groups`: "params", "lr" and "weight_decay" of each. What
they return is clipped as SOLVER.CLIP_GRADIENTS says, scheduled, checkpointed and resumed.
"""


def network_of(model: nn.Module) -> RoPEViT | None:
    """The RoPE ViT of a detector, wrapped or not; None: its backbone is another."""
    # A compiled module gives its module's attributes as its own.
    net = _unwrapped(getattr(getattr(_unwrapped(model), "backbone", None), "net", None))
    return net if isinstance(net, RoPEViT) else None


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of a detector, by the names that they have where nothing is wrapped.

    Args:
        model: itself or parts of it may be under :class:`DistributedDataParallel` or
            :func:`torch.compile`.
    """
    for name, parameter in _unwrapped(model).named_parameters():
        yield name.replace(COMPILED, ""), parameter


def _unwrapped(module: Any) -> Any:
    """What is under torch's wrappers, in whatever order they are."""
    compiled = COMPILED.removesuffix(".")
    while isinstance(module, DataParallel | DistributedDataParallel) or hasattr(module, compiled):
        module = getattr(module, compiled, None) or module.module
    return module


def layer_decay_factor(name: str, decay: float, num_layers: int) -> float:
    """The factor on a parameter's learning rate (BEiT, arXiv 2106.08254; as ViTDet applies it).

    Stem, special tokens and position table are layer 0, block i is layer i + 1; the pyramid and
    the heads learn at the full rate.

    Args:
        name: of the parameter, in a detector whose `backbone.net` is a RoPE ViT.
        decay: rate of a layer relative to the next one.
        num_layers: blocks of the backbone.
    """
    block = BLOCK.match(name)
    if block:
        layer = int(block[1]) + 1
    else:
        layer = 0 if name.startswith("backbone.net.") else num_layers + 1
    return decay ** (num_layers + 1 - layer)


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """False for norms, biases and scales (one dimension), tokens, positions and frequencies."""
    return parameter.dim() > 1 and name.rpartition(".")[2] not in _NO_DECAY


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    embedding_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a detector, grouped for an optimizer by rate and weight decay.

    Args:
        model: whose `backbone.net` is a RoPE ViT; without one, every layer learns at `base_lr`.
            It may be under :class:`DistributedDataParallel` or :func:`torch.compile`.
        base_lr: of pyramid and heads; the network's layers learn at a share of it.
        layer_decay: see :func:`layer_decay_factor`.
        embedding_decay: weight decay of every :class:`torch.nn.Embedding`, such as queries.
    """
    net = network_of(model)
    num_layers = 0 if net is None else len(net.encoder.block)
    decay = 1.0 if net is None else layer_decay
    # An embedding's weight is told by its module, all else by its name.
    decays = {id(m.weight): embedding_decay for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            rate = base_lr * layer_decay_factor(name, decay, num_layers)
            usual = weight_decay if has_weight_decay(name, parameter) else 0.0
            own = decays.get(id(parameter), usual)
            groups.append({"params": [parameter], "lr": rate, "weight_decay": own})
    return reduce_param_groups(groups)


def layer_of(name: str, *, has_rope_vit: bool) -> str:
    """The row of a parameter: a block or the stem of the network, or a part of the detector.

    Args:
        has_rope_vit: whether that is what the detector has as `backbone.net`.
    """
    if has_rope_vit and name.startswith("backbone.net."):
        block = BLOCK.match(name)
        return block[0].removesuffix(".") if block else "backbone.net (stem, tokens, positions)"
    parts = name.split(".")[:-1] or [name]  # of the model itself
    return ".".join(parts[:2] if parts[0] == "roi_heads" else parts[:1])


def learning_rate_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Layer, learning rate, weight decay and number of weights, frozen ones marked as such.

    Args:
        model: the detector.
        optimizer: of its parameters, before a schedule has changed its rates.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rows: dict[tuple, int] = {}
    has_rope_vit = network_of(model) is not None
    for name, parameter in named_parameters(model):
        group = groups.get(id(parameter))
        rates = (f"{group['lr']:.3g}", group["weight_decay"]) if group else ("frozen", "")
        row = (layer_of(name, has_rope_vit=has_rope_vit), *rates)
        rows[row] = rows.get(row, 0) + parameter.numel()
    table = [[*row, f"{count:,}"] for row, count in rows.items()]
    headers = ["layer", "learning rate", "weight decay", "weights"]
    return tabulate(table, headers, disable_numparse=True, colalign=("left",) + ("right",) * 3)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the trainable parameters, with SOLVER's rates, decays and clipping.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be "full_model" besides Detectron2's "value" and "norm",
    which clip each gradient alone: the norm of all gradients together is clipped. Weights of
    :class:`torch.nn.Embedding` have no weight decay, or SOLVER.WEIGHT_DECAY_EMBED where a project
    adds that key.

    Raises:
        InputError: an unknown optimizer, a key that it does not read, or what is registered makes
            no optimizer.
    """
    check_optimizer_config(cfg)
    if network_of(model) is None:
        warn_of_high_rate(cfg)  # the builder of a RoPE ViT has looked at it
    groups = parameter_groups(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        layer_decay=cfg.SOLVER.LAYER_DECAY,
        # Mask2Former's key, and that of what is made from it; other configs lack it.
        embedding_decay=cfg.SOLVER.get("WEIGHT_DECAY_EMBED", 0.0),
    )
    make = _find(cfg.SOLVER.OPTIMIZER)
    # A class would take cfg for its parameters, and fail in torch's words.
    optimizer = make if isinstance(make, type) else make(cfg, groups, model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, which gives {optimizer!r}; register a "
            "function (cfg, groups, model) that returns a torch.optim.Optimizer"
        )
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        optimizer.register_step_pre_hook(partial(_clip, clip))
    return optimizer


def _find(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name in OPTIMIZERS:
        return OPTIMIZERS.get(name)
    known = [each for each, _ in OPTIMIZERS]
    if importlib.util.find_spec("timm"):
        from timm.optim import get_optimizer_info, list_optimizers

        timms = map(str, list_optimizers())
        known += [f"timm:{each}" for each in timms if not get_optimizer_info(each).second_order]
        if name in known:
            return _timm
    raise InputError(
        f"SOLVER.OPTIMIZER is {name!r}{did_you_mean(name, known)}; registered are "
        f"{', '.join(each for each, _ in OPTIMIZERS)} (Muon: with torch 2.9 or newer), timm's are "
        "timm:NAME where timm is installed, and your own is registered at the top level of your "
        "script"
    )


def _timm(cfg: CfgNode, groups: list[dict], model: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    name = cfg.SOLVER.OPTIMIZER.removeprefix("timm:")
    return create_optimizer_v2(groups, name, lr=cfg.SOLVER.BASE_LR)


@OPTIMIZERS.register()
def AdamW(cfg: CfgNode, groups: list[dict], model: nn.Module) -> torch.optim.Optimizer:  # noqa: N802
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, fused=_are_on_gpu(groups))


def _are_on_gpu(groups: list[dict]) -> bool | None:
    """AdamW's `fused`, one kernel for all weights; None on the CPU, whose last bits it changes."""
    return all(p.is_cuda for group in groups for p in group["params"]) or None


@OPTIMIZERS.register()
def SGD(cfg: CfgNode, groups: list[dict], model: nn.Module) -> torch.optim.Optimizer:  # noqa: N802
    solver = cfg.SOLVER
    return torch.optim.SGD(
        groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer.

    Muon's steps are scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so that one
    learning rate and weight decay serve both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        """
        Args:
            groups: with "muon" True where all parameters are matrices for Muon, else False.
        """
        super().__init__(groups, {"lr": lr})
        # They fill the defaults of their groups in, which are this optimizer's own.
        self._parts = {
            True: torch.optim.Muon(self._groups(True), lr, adjust_lr_fn="match_rms_adamw"),
            False: torch.optim.AdamW(self._groups(False), lr, fused=_are_on_gpu(groups)),
        }

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] is muon]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for muon, part in self._parts.items():
            # Anew each time: a checkpoint that was loaded has put other objects there.
            part.param_groups, part.state = self._groups(muon), self.state
            part.step()
        return loss


def Muon(cfg: CfgNode, groups: list[dict], model: nn.Module) -> torch.optim.Optimizer:  # noqa: N802
    matrices = {id(p) for n, p in named_parameters(model) if BLOCK.match(n) and p.dim() == 2}
    split = []
    for group in groups:
        for muon in (True, False):
            some = [p for p in group["params"] if (id(p) in matrices) is muon]
            if some:
                split.append({**group, "params": some, "muon": muon})
    if not any(group["muon"] for group in split):
        raise InputError(
            "SOLVER.OPTIMIZER is 'Muon', which is for the matrices of a RoPE ViT's blocks, and "
            "none of them learns here: set SOLVER.OPTIMIZER AdamW"
        )
    return MuonWithAdamW(split, cfg.SOLVER.BASE_LR)


if hasattr(torch.optim, "Muon"):
    OPTIMIZERS.register(Muon)


def _clip(
    clip: CfgNode, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Clips all gradients in a few calls; Detectron2 does one by one, and has no "full_model"."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # A GradScaler leaves it to a fused optimizer to unscale, as Detectron2's AMPTrainer does.
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for gradient in gradients:
            gradient.div_(scale)
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    if clip.CLIP_TYPE == "value":
        nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
    elif clip.CLIP_TYPE == "norm":
        clip_each_norm(gradients, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

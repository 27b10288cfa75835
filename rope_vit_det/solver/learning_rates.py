"""What each part of a detector learns at: a table for the start of a run."""

import torch
from tabulate import tabulate
from torch import nn

from .optimizers import BLOCK, network_of


def layer_of(name: str, *, has_rope_vit: bool) -> str:
    """The row of a parameter: a block or the stem of the network, or a part of the detector.

    Args:
        has_rope_vit: whether that is what the detector has as `backbone.net`.
    """
    if has_rope_vit and (block := BLOCK.match(name)):
        return block[0].removesuffix(".")
    if has_rope_vit and name.startswith("backbone.net."):
        return "backbone.net (stem, tokens, positions)"
    parts = name.split(".")[:-1]
    return ".".join(parts[:2] if parts[0] == "roi_heads" else parts[:1])


def learning_rate_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Layer, learning rate, weight decay and number of weights, frozen ones marked as such.

    Args:
        model: the detector, not under :class:`DistributedDataParallel`.
        optimizer: of its parameters, before a schedule has changed its rates.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rows: dict[tuple, int] = {}
    has_rope_vit = network_of(model) is not None
    for name, parameter in model.named_parameters():
        group = groups.get(id(parameter))
        rates = (group["lr"], group["weight_decay"]) if group else ("frozen", "")
        row = (layer_of(name, has_rope_vit=has_rope_vit), *rates)
        rows[row] = rows.get(row, 0) + parameter.numel()
    table = [
        [layer, f"{rate:.3g}" if rate != "frozen" else rate, decay, f"{count:,}"]
        for (layer, rate, decay), count in rows.items()
    ]
    headers = ["layer", "learning rate", "weight decay", "weights"]
    return tabulate(table, headers, disable_numparse=True, colalign=("left",) + ("right",) * 3)

"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685, section 4.1)."""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import QueryValueBias

ADAPTER = ("lora_a", "lora_b", "lora_scale")


class AdaptedLinear(nn.Linear):
    """A linear layer and the product of two small matrices beside it, which is zero at first.

    Its own parameters keep their names. New are ``lora_a`` (rank, in), ``lora_b`` (out, rank) and
    the buffer ``lora_scale`` (), alpha / rank.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    lora_dropout: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_a)
        return super().forward(x) + F.linear(self.lora_scale * low, self.lora_b)


class AdaptedQueryValueBias(AdaptedLinear, QueryValueBias):
    """The same of a :class:`QueryValueBias`."""


_ADAPTED: dict[type[nn.Linear], type[AdaptedLinear]] = {
    nn.Linear: AdaptedLinear,
    QueryValueBias: AdaptedQueryValueBias,
}


def add_adapter(layer: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
    """Makes a layer an :class:`AdaptedLinear`, in place; its own parameters are frozen.

    Args:
        rank: of the product.
        alpha: the product is multiplied by alpha / rank.
        dropout: share of the inputs that the product does not see in training.
    """
    layer.requires_grad_(False)
    weight = layer.weight
    # The layer stays the one that others hold, under its name.
    layer.__class__ = _ADAPTED[type(layer)]
    assert isinstance(layer, AdaptedLinear)
    layer.lora_a = nn.Parameter(weight.new_empty(rank, layer.in_features))
    layer.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, rank))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.register_buffer("lora_scale", weight.new_tensor(alpha / rank))
    layer.lora_dropout = dropout


def merge_adapters(model: nn.Module) -> None:
    """Adds the products to the weights; the layers are plain ones again, in place."""
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            merged = merge_state(layer.state_dict())
            for name in ADAPTER:
                delattr(layer, name)
            plain: nn.Module = layer
            plain.__class__ = QueryValueBias if isinstance(layer, QueryValueBias) else nn.Linear
            layer.load_state_dict(merged)


def merge_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the products added to the weights, without the adapters."""
    merged = {key: t for key, t in state.items() if key.rpartition(".")[2] not in ADAPTER}
    for key in state:
        stem, _, name = key.rpartition("lora_a")
        if not name and stem + "weight" in merged:
            a, b = state[key].float(), state[f"{stem}lora_b"].float()
            product = state[f"{stem}lora_scale"].float() * (b @ a)
            weight = merged[f"{stem}weight"]
            merged[f"{stem}weight"] = (weight.float() + product).to(weight.dtype)
    return merged

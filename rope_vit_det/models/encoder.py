"""The encoder of the vision transformer: its blocks, and the norm before them."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..layers.attention import RotaryAttention, attend_within
from ..layers.cpu import RunningAttention, num_parts
from ..layers.mlp import FeedForward, LayerScale, SwiGLU
from ..layers.rope import Rotation
from ..layers.windows import WindowGroup, num_tokens, window_parts


class Encoder(nn.Module):
    """The blocks, with the norm before them that some networks have."""

    def __init__(self, blocks: list["EncoderBlock"], *, pre_norm: nn.Module | None) -> None:
        super().__init__()
        self.pre_block = nn.Sequential(*([] if pre_norm is None else [pre_norm]))
        self.block = nn.ModuleList(blocks)


class EncoderBlock(nn.Module):
    """Attention and feed-forward layer, each after a norm and on a residual branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_special_tokens: int,
        norm: Callable[[int], nn.Module],
        mlp_layer: Literal["FeedForward", "SwiGLU", "NormSwiGLU"],
        attn_norm: bool,
        layer_scale_init_value: float | None,
        drop_path: float,
        rotation: Rotation,
    ) -> None:
        super().__init__()

        def layer_scale() -> nn.Module:
            if layer_scale_init_value is None:
                return nn.Identity()
            return LayerScale(dim, layer_scale_init_value)

        self.norm1 = norm(dim)
        self.attn = RotaryAttention(
            dim,
            num_heads,
            num_special_tokens=num_special_tokens,
            rotation=rotation,
            norm=norm(dim) if attn_norm else None,
        )
        self.layer_scale_1 = layer_scale()
        self.norm2 = norm(dim)
        if mlp_layer == "FeedForward":
            self.mlp = FeedForward(dim, mlp_dim)
        else:
            self.mlp = SwiGLU(dim, mlp_dim, norm=norm(mlp_dim) if mlp_layer != "SwiGLU" else None)
        self.layer_scale_2 = layer_scale()
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(
        self, x: Tensor, rope: Tensor, windows: Sequence[WindowGroup] | None = None
    ) -> Tensor:
        """(B, S + N, C) to the same; the arguments are those of :class:`RotaryAttention`.

        ``x`` may be more precise than the weights, and then stays so.
        """
        if windows is not None and not self.training and num_parts(x) > 1:
            return self._windows_by_parts(x, rope, windows)
        return self._finish(x, self.attn(self._normed(x), rope, windows))

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm1(x.to(self.norm1.weight.dtype))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, which looks at every token by itself."""
        x = x + self.drop_path(self.layer_scale_1(attended))
        y = self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))
        return x + self.drop_path(self.layer_scale_2(y))

    def _windows_by_parts(self, x: Tensor, rope: Tensor, windows: Sequence[WindowGroup]) -> Tensor:
        """The whole block for some windows after the others, which then stay in the cache.

        Windows meet in the special tokens alone. Those go through the block with the first windows,
        which wait before the end until the special tokens have attended to all the others.
        """
        attn, out = self.attn, torch.empty_like(x)
        first, *others = window_parts(windows, num_parts(x))

        rows = slice(0, attn.num_special_tokens + num_tokens(first))
        q, k, v = attn.project(self._normed(x[:, rows]), rope[:, rows])
        sizes = [attn.num_special_tokens, num_tokens(first)]
        (q_special, *special), patches = zip(*(t.split(sizes, 1) for t in (q, k, v)), strict=True)
        seen = RunningAttention(q_special)
        seen.add(k, v)
        found_first, rows_first = attend_within(*patches, *special, first), rows

        for part in others:
            rows = slice(rows.stop, rows.stop + num_tokens(part))
            q, k, v = attn.project(self._normed(x[:, rows]), rope[:, rows])
            seen.add(k, v)
            found = attend_within(q, k, v, *special, part)
            out[:, rows] = self._finish(x[:, rows], attn.combine(found))

        found = torch.cat((seen.result(), found_first), dim=1)
        out[:, rows_first] = self._finish(x[:, rows_first], attn.combine(found))
        return out

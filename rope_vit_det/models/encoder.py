"""The encoder of the vision transformer: its blocks, and the norm before them."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..layers import cpu
from ..layers.attention import QKVBias, RotaryAttention
from ..layers.mlp import FeedForward, LayerScale, SwiGLU
from ..layers.rope import Rotation
from ..layers.windows import WindowGroup

MLPLayer = Literal["FeedForward", "SwiGLU", "NormSwiGLU"]


class Encoder(nn.Module):
    """The blocks, with the norm before them that some networks have."""

    def __init__(self, blocks: list["EncoderBlock"], *, pre_norm: nn.Module | None) -> None:
        super().__init__()
        self.pre_block = nn.Sequential(*([] if pre_norm is None else [pre_norm]))
        self.block: Sequence[EncoderBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]


class EncoderBlock(nn.Module):
    """Attention and feed-forward layer, each after a norm and on a residual branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_special_tokens: int,
        norm: Callable[[int], nn.LayerNorm | nn.RMSNorm],
        mlp_layer: MLPLayer,
        attn_norm: bool,
        layer_scale_init_value: float | None,
        drop_path: float,
        rotation: Rotation,
        qkv_bias: QKVBias = "qkv",
        learned_rope_temperature: float | None = None,
    ) -> None:
        """
        Args:
            dim: channels of a token.
            num_heads: of the attention; ``dim`` is a multiple of it.
            mlp_dim: hidden channels of the feed-forward layer.
            num_special_tokens: leading tokens, which are global also where attention is windowed.
            norm: makes the norm of that many channels.
            mlp_layer: linear, GELU, linear; or gated, with a norm before its last linear layer or
                without.
            attn_norm: normalises the attention output before its projection.
            layer_scale_init_value: of the learned scale per channel that ends either branch; None:
                there is none.
            drop_path: share of the samples that skip a branch in training.
            rotation: which channels of queries and keys are turned together; see
                :class:`~rope_vit_det.layers.rope.RotaryEmbedding2D`.
            qkv_bias, learned_rope_temperature: of :class:`RotaryAttention`.
        """
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
            qkv_bias=qkv_bias,
            learned_rope_temperature=learned_rope_temperature,
        )
        self.layer_scale_1 = layer_scale()
        self.norm2 = norm(dim)
        self.mlp: nn.Module
        if mlp_layer == "FeedForward":
            self.mlp = FeedForward(dim, mlp_dim)
        else:
            self.mlp = SwiGLU(dim, mlp_dim, norm=norm(mlp_dim) if mlp_layer != "SwiGLU" else None)
        self.layer_scale_2 = layer_scale()
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        windows: Sequence[WindowGroup] | None = None,
        kept: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """(B, S + N, C) to the same; the arguments are those of :class:`RotaryAttention`.

        ``x`` may be more precise than the weights, and then stays so.

        Args:
            kept: what :meth:`draw_kept` drew for the two branches; None: is drawn here.
        """
        if cpu.takes(self, x):
            return cpu.block_forward(self, x, rope, windows)
        y = self.attn(self.norm1(x.to(self.norm1.weight.dtype)), rope, windows)
        x = x + self._drop(self.layer_scale_1(y), kept[0])
        y = self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))
        return x + self._drop(self.layer_scale_2(y), kept[1])

    def draw_kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Stochastic depth's factors of the two branches, (B, 1, 1), for a graph of any rate."""
        if not self.training:
            return None, None
        # Not the same ones, which a rate of 0 would return: a graph tells that apart.
        first, second = (self.drop_path(x.new_ones(len(x), 1, 1)) for _ in range(2))
        return first, second

    def _drop(self, y: Tensor, kept: Tensor | None) -> Tensor:
        if kept is not None:
            return y * kept
        # A graph would belong to the rate, of which there is nothing to do in inference.
        skip = torch.compiler.is_compiling() and not self.training
        return y if skip else self.drop_path(y)

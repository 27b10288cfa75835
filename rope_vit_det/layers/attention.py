"""Multi-head self-attention with rotary positions, over the whole grid or over windows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu as cpu_kernels
from .cpu import Linear
from .graphs import is_building_graph
from .rope import Rotation, apply_rotary
from .windows import WindowGroup, num_tokens

# Where our CPU kernels serve, plain bf16 products over all heads at once are the fastest up to some
# number of keys: 0.012 s where the fused kernel takes 0.022 s, for 16 windows of 16 x 16.
_MAX_PLAIN_KEYS = 1024


class RotaryAttention(nn.Module):
    """Self-attention in which the patch tokens' queries and keys carry rotary positions."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_special_tokens: int,
        rotation: Rotation = "halves",
        norm: nn.Module | None = None,
    ) -> None:
        """
        Args:
            dim: channels, a multiple of ``num_heads``.
            num_special_tokens: leading tokens that attend to, and are attended by, all others also
                where attention is windowed.
            norm: applied to the heads' concatenated output before the projection, as in NormFormer
                (arXiv 2110.09456) and EVA-02 (arXiv 2303.11331, section 2.1).
        """
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.num_special_tokens = num_special_tokens
        self.rotation = rotation
        self.qkv = Linear(dim, 3 * dim)
        self.norm = nn.Identity() if norm is None else norm
        self.proj = Linear(dim, dim)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, rope: Tensor, windows: Sequence[WindowGroup] | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, S + N, C), special tokens first.
            rope: (2, S + N, C / num_heads), the table of these tokens.
            windows: the runs of windows among the N patch tokens; None: attention over all.

        Returns:
            Tensor: (B, S + N, C).
        """
        parts = cpu_kernels.num_parts(x)
        if parts == 1:
            q, k, v = self.project(x, rope)
        else:
            pairs = zip(x.chunk(parts, dim=1), rope.chunk(parts, dim=1), strict=True)
            found = [self.project(*pair) for pair in pairs]
            q, k, v = (torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
        if windows is None:
            return self.combine(attend(q, k, v))
        return self.combine(attend_windows(q, k, v, self.num_special_tokens, windows))

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: each (B, N, H, D), of any tokens (B, N, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
        if torch.is_grad_enabled() or is_building_graph():
            q, k = apply_rotary(qkv[:, :, :2], rope, self.rotation).unbind(2)
            # A copy, so that the backward pass does not keep all of qkv for the sake of this third.
            return q, k, qkv[:, :, 2].contiguous()
        apply_rotary(qkv[:, :, :2], rope, self.rotation, in_place=True)
        return qkv.unbind(2)

    def combine(self, x: Tensor) -> Tensor:
        """What the heads found, (B, N, H, D), to (B, N, C)."""
        return self.proj(self.norm(x.flatten(2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, Nq, H, D) queries over (B, Nk, H, D) keys and values."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cpu_kernels.usable(q):
        if k.shape[2] > _MAX_PLAIN_KEYS:
            return cpu_kernels.attend_by_heads(q, k, v).transpose(1, 2)
        if q.dtype == torch.bfloat16:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            return (scores.softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, num_special_tokens: int, windows: Sequence[WindowGroup]
) -> Tensor:
    """Attention within windows, with special tokens that are global.

    Special tokens attend to all tokens; the tokens of a window attend to that window and to the
    special tokens.

    Args:
        q, k, v: (B, S + N, H, D), special tokens first, the rest window by window.
        windows: the runs of windows among the N.

    Returns:
        Tensor: (B, S + N, H, D).
    """
    s = num_special_tokens
    # Split rather than sliced: a graph for many sizes then knows that the parts make up the whole.
    sizes = [s, num_tokens(windows)]
    special, patches = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), strict=True)
    q_special, *special = special
    within = attend_within(*patches, *special, windows)
    return torch.cat((attend(q_special, k, v), within), dim=1) if s else within


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_special: Tensor,
    v_special: Tensor,
    windows: Sequence[WindowGroup],
) -> Tensor:
    """Attention of patch tokens to their own window and to the special tokens.

    Args:
        q, k, v: (B, N, H, D), window by window.
        k_special, v_special: (B, S, H, D).
        windows: the runs of windows that make up the N.

    Returns:
        Tensor: (B, N, H, D).
    """
    sizes = [num * tokens for _, num, tokens in windows]
    runs = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), strict=True)
    out = []
    for (_, num, _), (q_run, k_run, v_run) in zip(windows, runs, strict=True):

        def split(t: Tensor, num: int = num) -> Tensor:
            return t.unflatten(1, (num, -1))  # (B, num, tokens, H, D)

        def with_special(special: Tensor, t: Tensor, num: int = num, split=split) -> Tensor:
            special = special[:, None].expand(-1, num, -1, -1, -1)
            return torch.cat((special, split(t)), dim=2).flatten(0, 1)

        keys, values = with_special(k_special, k_run), with_special(v_special, v_run)
        y = attend(split(q_run).flatten(0, 1), keys, values)
        out.append(y.unflatten(0, (-1, num)).flatten(1, 2))
    return torch.cat(out, dim=1)

"""Multi-head self-attention with rotary positions, over the whole grid or over windows."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rotation, apply_rotary
from .windows import WindowGroup, num_tokens


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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.Identity() if norm is None else norm
        self.proj = nn.Linear(dim, dim)
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
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, S + N, 3, H, D)
        q, k = apply_rotary(qkv[:, :, :2], rope, self.rotation).unbind(2)
        # A copy, so that the backward pass does not keep all of qkv for the sake of this third.
        v = qkv[:, :, 2].contiguous()
        if windows is None:
            x = attend(q, k, v)
        else:
            x = attend_windows(q, k, v, self.num_special_tokens, windows)
        return self.proj(self.norm(x.flatten(2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, Nq, H, D) queries over (B, Nk, H, D) keys and values."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_special_tokens: int,
    windows: Sequence[WindowGroup],
    attend: Attend = attend,
) -> Tensor:
    """Attention within windows, with special tokens that are global.

    Special tokens attend to all tokens; the tokens of a window attend to that window and to the
    special tokens.

    Args:
        q, k, v: (B, S + N, H, D), special tokens first, the rest window by window.
        windows: the runs of windows among the N.
        attend: :func:`attend`, or another kernel for it.

    Returns:
        Tensor: (B, S + N, H, D).
    """
    # Split rather than sliced: a graph for many sizes then knows that the parts make up the whole.
    sizes = [num_special_tokens, num_tokens(windows)]
    special, patches = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), strict=True)
    within = attend_within(*patches, *special[1:], windows, attend)
    if num_special_tokens == 0:
        return within
    return torch.cat((attend(special[0], k, v), within), dim=1)


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_special: Tensor,
    v_special: Tensor,
    windows: Sequence[WindowGroup],
    attend: Attend = attend,
) -> Tensor:
    """Attention of patch tokens to their own window and to the special tokens.

    Args:
        q, k, v: (B, N, H, D), window by window.
        k_special, v_special: (B, S, H, D).
        windows: the runs of windows that make up the N.
        attend: :func:`attend`, or another kernel for it.

    Returns:
        Tensor: (B, N, H, D).
    """
    sizes = [num * tokens for _, num, tokens in windows]
    runs = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), strict=True)
    out = []
    for (_, num, _), run in zip(windows, runs, strict=True):
        # (B, num, tokens, H, D)
        q, k, v = (t.unflatten(1, (num, -1)) for t in run)
        k, v = (
            torch.cat((special[:, None].expand(-1, num, -1, -1, -1), t), dim=2)
            for special, t in ((k_special, k), (v_special, v))
        )
        y = attend(*(t.flatten(0, 1) for t in (q, k, v)))
        out.append(y.unflatten(0, (-1, num)).flatten(1, 2))
    return torch.cat(out, dim=1)

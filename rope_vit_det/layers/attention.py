"""Multi-head self-attention with rotary positions, over the whole grid or over windows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rotation, apply_rotary, random_frequencies, rotary_table
from .windows import WindowGroup, num_tokens

QKVBias = Literal["qkv", "qv", ""]


class QueryValueBias(nn.Linear):
    """A linear layer to queries, keys and values of which the keys have no bias.

    BEiT (arXiv 2106.08254) and what follows it: the softmax does not see a bias of the keys that is
    not turned. ``bias`` holds those of queries and values, (2 * dim,).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(2 * dim))

    def whole_bias(self) -> Tensor:
        """(3 * dim,), with zeros for the keys."""
        q, v = self.bias.chunk(2)
        return torch.cat((q, torch.zeros_like(q), v))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., 3 * dim)."""
        return F.linear(x, self.weight, self.whole_bias())


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
        qkv_bias: QKVBias = "qkv",
        learned_rope_temperature: float | None = None,
    ) -> None:
        """
        Args:
            dim: channels, a multiple of ``num_heads``.
            num_special_tokens: leading tokens that attend to, and are attended by, all others also
                where attention is windowed.
            norm: applied to the heads' concatenated output before the projection, as in NormFormer
                (arXiv 2110.09456) and EVA-02 (arXiv 2303.11331, section 2.1).
            qkv_bias: which of queries, keys and values have a bias: all, "qv" or none ("").
            learned_rope_temperature: learn the frequencies of the rotation, from ones of this
                temperature on (:func:`~rope_vit_det.layers.rope.random_frequencies`); None: they
                are in the table.
        """
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.num_special_tokens = num_special_tokens
        self.rotation = rotation
        self.qkv: nn.Linear
        if qkv_bias == "qv":
            self.qkv = QueryValueBias(dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "qkv")
        self.frequencies: nn.Parameter | None = None
        if learned_rope_temperature is not None:
            start = random_frequencies(dim // num_heads, num_heads, learned_rope_temperature)
            self.frequencies = nn.Parameter(start)
        self.norm = nn.Identity() if norm is None else norm
        self.proj = nn.Linear(dim, dim)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, rope: Tensor, windows: Sequence[WindowGroup] | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, S + N, C), special tokens first.
            rope: (2, S + N, C / num_heads), the table of these tokens; (1, S + N, 2), their
                positions, where frequencies are learned.
            windows: the runs of windows among the N patch tokens; None: attention over all.

        Returns:
            Tensor: (B, S + N, C).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, S + N, 3, H, D)
        if self.frequencies is not None:
            rope = self.table_of(rope).to(qkv.dtype)
        q, k = apply_rotary(qkv[:, :, :2], rope, self.rotation).unbind(2)
        v = qkv[:, :, 2]
        if torch.is_grad_enabled():  # the backward pass is not to keep all of qkv for this third
            v = v.contiguous()
        if windows is None:
            x = attend(q, k, v)
        else:
            x = attend_windows(q, k, v, self.num_special_tokens, windows)
        return self.proj(self.norm(x.flatten(2)))

    def table_of(self, positions: Tensor) -> Tensor:
        """Positions (1, N, 2) to a table of each head, (2, N, H, D), float32."""
        assert self.frequencies is not None
        y, x = positions[0, :, :, None, None].unbind(1)  # (N, 1, 1)
        angles = y * self.frequencies[0].float() + x * self.frequencies[1].float()
        return rotary_table(angles, self.rotation, "repeated")


@contextmanager
def kernels_for_any_size() -> Iterator[None]:
    """Keeps cuDNN's attention out, which builds a plan for every shape that it meets.

    That takes tens of milliseconds and more each, of which a grid with windows has a dozen: more
    than the faster kernels gain before the next size comes.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


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
    (q_s, q_p), (k_s, k_p), (v_s, v_p) = (t.split(sizes, dim=1) for t in (q, k, v))
    runs = attend_within(q_p, k_p, v_p, k_s, v_s, windows, attend)
    if num_special_tokens:
        runs.insert(0, attend(q_s, k, v))
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_special: Tensor,
    v_special: Tensor,
    windows: Sequence[WindowGroup],
    attend: Attend = attend,
) -> list[Tensor]:
    """Attention of patch tokens to their own window and to the special tokens.

    Args:
        q, k, v: (B, N, H, D), window by window.
        k_special, v_special: (B, S, H, D).
        windows: the runs of windows that make up the N.
        attend: :func:`attend`, or another kernel for it.

    Returns:
        list: of each run (B, num * tokens, H, D).
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
    return out

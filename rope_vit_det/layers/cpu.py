"""All that exists only to be fast on CPUs, behind one door of an encoder block.

The block asks :func:`takes`, and :func:`block_forward` then gives what its plain forward pass would
give. A block with a hook in it, or with a part that is not its own any more, takes the plain one:
here parts are not called, or for some of the tokens at a time.

PyTorch's defaults leave speed on the table on x86 CPUs. Measured with torch 2.15
(docs/speed.md) on two cores of an AMD EPYC (family 26, AVX-512):

* float32 products go to MKL, which takes its AVX2 path on CPUs that are not Intel's: 200 GFLOP/s,
  where oneDNN, which PyTorch carries as well, makes 320 to 470 of the same product.
* `scaled_dot_product_attention` makes little use of bf16 matrix instructions: 0.29 s over 4101
  tokens and 12 heads, where one head after the other in chunks of queries takes 0.11 s.

On an AMD EPYC without AVX-512 (family 25) oneDNN makes 123 to 130 GFLOP/s of linear layers over
1024 tokens, MKL 98 to 122. It serves inference there; attention, and the backward pass with its
transposed matrices, are better left to PyTorch's defaults. On two cores of an Intel Xeon (model
207) these win all of it: there they stay.

bf16 products are several times as fast as float32 ones where the CPU has good instructions for
them. Elsewhere they are slower: 161 beside 280 GFLOP/s on that Xeon, 15 beside 103 on an AMD EPYC
without AVX-512 (family 25). There the network does not follow autocast to bf16
(:func:`is_slow_bf16_autocast`).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import StochasticDepth

from ..utils.torch_private import are_watched, has_onednn_linear, is_transformed, onednn_linear
from . import attention
from .attention import QueryValueBias, RotaryAttention, attend_windows, attend_within
from .graphs import is_building_graph
from .mlp import FeedForward, LayerScale, SwiGLU
from .rope import apply_rotary
from .windows import WindowGroup, num_tokens, window_parts

if TYPE_CHECKING:
    from ..models.encoder import EncoderBlock

# Queries whose scores are held at once: (512, 4101) stays within the last cache.
_CHUNK = 512
# Below, calls cost more than the better kernel gains.
_MIN_ROWS = 64
# Most tokens of a part: their 3072 hidden channels stay in the cache, and below the 32 MiB from
# which on glibc takes every tensor's memory anew from the system.
_PART_TOKENS = 1200
# Where these kernels serve, plain bf16 products over all heads at once are the fastest up to some
# number of keys: 0.012 s where the fused kernel takes 0.022 s, for 16 windows of 16 x 16.
_MAX_PLAIN_KEYS = 1024
# What the parts of a block may be.
_PARTS = (
    RotaryAttention,
    FeedForward,
    SwiGLU,
    nn.Linear,
    QueryValueBias,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GELU,
    nn.Identity,
    StochasticDepth,
    LayerScale,
)


def _supported(*capabilities: str) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in capabilities
        and has_onednn_linear()
    )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _is_intels(cpuinfo: str) -> bool:
    return not cpuinfo or "GenuineIntel" in cpuinfo


def _has_slow_bf16(cpuinfo: str) -> bool:
    """Whether bf16 products are slower than float32 ones; False for CPUs that are not x86."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith("flags")]
    if not lines:
        return False
    flags = lines[0].split()
    return "amx_bf16" not in flags and (_is_intels(cpuinfo) or "avx512_bf16" not in flags)


# By the maker, not by a measurement: a run that is resumed must take the kernels that it took.
# _ENABLED: all kernels here; _ENABLED_IN_INFERENCE: linear layers without a backward pass.
_ENABLED = _supported("AVX512") and not _is_intels(_cpuinfo())
_ENABLED_IN_INFERENCE = _supported("AVX2", "AVX512") and not _is_intels(_cpuinfo())
_SLOW_BF16 = _has_slow_bf16(_cpuinfo())


def is_slow_at_bf16(device: torch.device | str) -> bool:
    """Whether bf16 costs time and precision on this device instead of saving: on some CPUs."""
    return _SLOW_BF16 and torch.device(device).type == "cpu"


def is_slow_bf16_autocast(device: torch.device) -> bool:
    """Whether autocast to bf16 is on, on a device that :func:`is_slow_at_bf16`.

    Not while a graph is made, which may be for another machine.
    """
    return (
        is_slow_at_bf16(device)
        and not is_building_graph()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def takes(block: "EncoderBlock", x: Tensor) -> bool:
    """Whether :func:`block_forward` serves a block for these tokens (B, N, C).

    Not while a graph is made, under `torch.func`, nor where someone looks into the block or has
    changed it.
    """
    if is_building_graph() or x.device.type != "cpu" or not (_ENABLED or _is_inference(block)):
        return False
    if is_transformed():
        return False
    block_itself, *parts = block.modules()
    return (
        all(type(part) in _PARTS for part in parts)
        and isinstance(block.mlp, FeedForward | SwiGLU)
        and block.attn.frequencies is None
        and not are_watched((block_itself, *parts))
    )


def block_forward(
    block: "EncoderBlock", x: Tensor, rope: Tensor, windows: Sequence[WindowGroup] | None
) -> Tensor:
    """The forward pass of a block that :func:`takes` these tokens, with its arguments."""
    # What a linear layer puts out then stays in the cache until it has been used: 137 ms instead of
    # 154 for the feed-forward layer of 4101 tokens (two cores of an Intel Xeon, model 207).
    parts = _num_parts(x) if _is_inference(block) else 1
    product = linear if parts == 1 else _with_weights_cast_once()
    if parts > 1 and windows is not None:
        return _windows_by_parts(block, product, x, rope, windows, parts)
    xs, ropes = x.chunk(parts, dim=1), rope.chunk(parts, dim=1)
    found = [_project(block, product, *part) for part in zip(xs, ropes, strict=True)]
    q, k, v = (_cat(tensors) for tensors in zip(*found, strict=True))
    if windows is None:
        attended = attend(q, k, v)
    else:
        attended = attend_windows(q, k, v, block.attn.num_special_tokens, windows, attend)
    pairs = zip(xs, attended.chunk(parts, dim=1), strict=True)
    return _cat([_finish(block, product, *pair) for pair in pairs])


def _num_parts(x: Tensor) -> int:
    return max(1, math.ceil(x.shape[:-1].numel() / _PART_TOKENS))  # a batch may be empty


def _cat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Parts of the tokens (B, N, …) together; a copy only where there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _is_inference(block: "EncoderBlock") -> bool:
    return not (block.training or torch.is_grad_enabled())


_Product = Callable[[nn.Module, Tensor], Tensor]


def _with_weights_cast_once() -> _Product:
    """:func:`linear` for a block by parts, whose weights autocast would cast anew for each part.

    Autocast keeps what it has cast of weights that learn, but not in inference mode.
    """
    if not torch.is_autocast_enabled("cpu"):
        return linear
    dtype = torch.get_autocast_dtype("cpu")
    cast: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

    def product(layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, nn.Linear):
            return linear(layer, x)
        if layer.weight.requires_grad and not torch.is_inference_mode_enabled():
            return linear(layer, x)
        if layer not in cast:
            bias = layer.whole_bias() if isinstance(layer, QueryValueBias) else layer.bias
            cast[layer] = layer.weight.to(dtype), None if bias is None else bias.to(dtype)
        return F.linear(x, *cast[layer])

    return product


def _windows_by_parts(
    block: "EncoderBlock",
    product: _Product,
    x: Tensor,
    rope: Tensor,
    windows: Sequence[WindowGroup],
    parts: int,
) -> Tensor:
    """The whole block for some windows after the others, which then stay in the cache.

    Windows meet in the special tokens alone. Those go through the block with the first windows,
    which wait before the end until the special tokens have attended to all the others.
    """
    special_tokens, out = block.attn.num_special_tokens, torch.empty_like(x)
    first, *others = window_parts(windows, parts)

    rows = slice(0, special_tokens + num_tokens(first))
    q, k, v = _project(block, product, x[:, rows], rope[:, rows])
    sizes = [special_tokens, num_tokens(first)]
    (q_special, q), (k_special, k_first), (v_special, v_first) = (
        t.split(sizes, 1) for t in (q, k, v)
    )
    seen = RunningAttention(q_special)
    seen.add(k, v)
    special = (k_special, v_special)
    found_first, rows_first = attend_within(q, k_first, v_first, *special, first, attend), rows

    for part in others:
        rows = slice(rows.stop, rows.stop + num_tokens(part))
        q, k, v = _project(block, product, x[:, rows], rope[:, rows])
        seen.add(k, v)
        found = _cat(attend_within(q, k, v, *special, part, attend))
        out[:, rows] = _finish(block, product, x[:, rows], found)

    found = _cat([seen.result(), *found_first])
    out[:, rows_first] = _finish(block, product, x[:, rows_first], found)
    return out


def _project(
    block: "EncoderBlock", product: _Product, x: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values: each (B, N, H, D), of any tokens (B, N, C)."""
    attn = block.attn
    qkv = product(attn.qkv, _normed(block.norm1, x)).unflatten(-1, (3, attn.num_heads, -1))
    if torch.is_grad_enabled():
        q, k = apply_rotary(qkv[:, :, :2], rope, attn.rotation).unbind(2)
        return q, k, qkv[:, :, 2].contiguous()
    apply_rotary(qkv[:, :, :2], rope, attn.rotation, in_place=True)
    return qkv.unbind(2)


def _normed(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    out: Tensor = norm(x.to(norm.weight.dtype))
    return out


def _finish(block: "EncoderBlock", product: _Product, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention, which looks at every token by itself."""
    attended = product(block.attn.proj, block.attn.norm(attended.flatten(2)))
    x = x + block.drop_path(block.layer_scale_1(attended))
    y = _feed_forward(block.mlp, product, _normed(block.norm2, x))
    return x + block.drop_path(block.layer_scale_2(y))


def _feed_forward(mlp: nn.Module, product: _Product, x: Tensor) -> Tensor:
    if isinstance(mlp, SwiGLU):
        gated = F.silu(product(mlp.fc1_g, x)) * product(mlp.fc1_x, x)
        return product(mlp.fc2, mlp.norm(gated))
    for layer in mlp.children():
        x = product(layer, x)
    return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`~rope_vit_det.layers.attention.attend` by the fastest kernel."""
    if not _ENABLED or q.dtype not in (torch.float32, torch.bfloat16):
        return attention.attend(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] > _MAX_PLAIN_KEYS:
        out: Tensor = _AttendByHeads.apply(q, k, v)
        return out.transpose(1, 2)
    if q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; of a float32 linear layer by oneDNN where that is faster than MKL."""
    grad = torch.is_grad_enabled()
    if (
        not isinstance(layer, nn.Linear)
        or type(layer) not in (nn.Linear, QueryValueBias)
        or not (_ENABLED if grad else _ENABLED_IN_INFERENCE)
        or x.dtype != torch.float32
        or layer.weight.dtype != torch.float32
        or x.numel() < _MIN_ROWS * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
    ):
        return layer(x)
    product = _Linear.apply if grad else onednn_linear
    bias = layer.whole_bias() if isinstance(layer, QueryValueBias) else layer.bias
    return product(x, layer.weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            onednn_linear(grad, weight.t(), None) if need_x else None,
            onednn_linear(rows.t(), x.flatten(0, -2).t(), None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of two matrices."""
    if a.dtype == torch.float32:
        return onednn_linear(a, b, None)
    return a @ b.t()


class _AttendByHeads(torch.autograd.Function):
    """Softmax attention of (B, H, Nq, D) over (B, H, Nk, D), one head and chunk after the other.

    The backward pass recomputes the scores (FlashAttention, arXiv 2205.14135, section 3.1), so that
    memory grows with the number of tokens, not with its square.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        scale = q.shape[-1] ** -0.5
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                query, key = q[b, h] * scale, k[b, h].contiguous()
                value_t = v[b, h].t().contiguous()
                for rows, chunk in zip(out[b, h].split(_CHUNK), query.split(_CHUNK), strict=True):
                    weights = _times_transposed(chunk, key).softmax(-1)
                    rows.copy_(_times_transposed(weights, value_t))
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                query, key, value = q[b, h] * scale, k[b, h].contiguous(), v[b, h].contiguous()
                key_t = key.t().contiguous()
                # float32: over a chunk after the other, bf16 would lose the small ones
                sum_k = torch.zeros(key.shape, dtype=torch.float32)
                sum_v = torch.zeros(value.shape, dtype=torch.float32)
                for start in range(0, len(query), _CHUNK):
                    rows = slice(start, start + _CHUNK)
                    grad = grad_out[b, h, rows].contiguous()
                    weights = _times_transposed(query[rows], key).softmax(-1)
                    sum_v += _times_transposed(weights.t(), grad.t())
                    inner = (grad.float() * out[b, h, rows].float()).sum(-1, keepdim=True)
                    d_scores = _times_transposed(grad, value)
                    d_scores.sub_(inner.to(grad.dtype)).mul_(weights)
                    grad_q[b, h, rows] = _times_transposed(d_scores, key_t) * scale
                    sum_k += _times_transposed(d_scores.t(), query[rows].t())
                grad_k[b, h], grad_v[b, h] = sum_k, sum_v
        return grad_q, grad_k, grad_v


class RunningAttention:
    """What queries find in the parts so far (online softmax: FlashAttention, arXiv 2205.14135).

    The arithmetic is that of float32 at least, under autocast too: there are few queries, and their
    scores would be what rounding to bf16 hurts. There is no backward pass.
    """

    def __init__(self, q: Tensor) -> None:
        """``q``: (B, Nq, H, D)."""
        self._dtype = q.dtype
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        self._q = (q * q.shape[-1] ** -0.5).transpose(1, 2)
        self._sum = torch.zeros_like(self._q)
        self._weight = torch.zeros_like(self._sum[..., :1])
        self._top = torch.full_like(self._weight, -torch.inf)

    def add(self, k: Tensor, v: Tensor) -> None:
        """Attends to at least one more key (B, Nk, H, D) and its value of the same shape."""
        k, v = (t.to(self._q.dtype).transpose(1, 2) for t in (k, v))
        with torch.autocast(k.device.type, enabled=False):
            scores = self._q @ k.transpose(2, 3)  # (B, H, Nq, Nk)
            top = torch.maximum(self._top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(top).exp_()
            fade = (self._top - top).exp_()
            self._weight.mul_(fade).add_(weights.sum(-1, keepdim=True))
            self._sum.mul_(fade).add_(weights @ v)
        self._top = top

    def result(self) -> Tensor:
        """(B, Nq, H, D), in the dtype of the queries."""
        return (self._sum / self._weight).to(self._dtype).transpose(1, 2)

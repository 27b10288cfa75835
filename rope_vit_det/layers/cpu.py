"""Matrix products and attention on x86 CPUs, where PyTorch's defaults leave speed on the table.

Measured with torch 2.15 (docs/high_resolution.md) on two cores of an AMD EPYC (family 26, AVX-512):

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .graphs import is_building_graph

# Queries whose scores are held at once: (512, 4101) stays within the last cache.
_CHUNK = 512
# Below, calls cost more than the better kernel gains.
_MIN_ROWS = 64
# Most tokens of a part: their 3072 hidden channels stay in the cache, and below the 32 MiB from
# which on glibc takes every tensor's memory anew from the system.
_PART_TOKENS = 1200


def _supported(*capabilities: str) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in capabilities
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
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


def usable(x: Tensor) -> bool:
    """Whether :func:`attend_by_heads` serves a tensor; not while a graph is made of the call."""
    return _ENABLED and x.dtype in (torch.float32, torch.bfloat16) and _is_eager_on_cpu(x)


def _is_eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not is_building_graph()


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


@contextmanager
def slow_bf16_too() -> Iterator[None]:
    """Within, autocast to bf16 is followed on any CPU: to measure the memory of a GPU."""
    global _SLOW_BF16
    before, _SLOW_BF16 = _SLOW_BF16, False
    try:
        yield
    finally:
        _SLOW_BF16 = before


class Linear(nn.Linear):
    """A :class:`torch.nn.Linear`, by oneDNN in float32 where that is faster than MKL."""

    def forward(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        if (
            not (_ENABLED if grad else _ENABLED_IN_INFERENCE)
            or not _is_eager_on_cpu(x)  # first: on the meta device, asking for autocast raises
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or x.numel() < _MIN_ROWS * x.shape[-1]
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x)
        product = _Linear.apply if grad else _product
        return product(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if need_x else None,
            _product(rows.t(), x.flatten(0, -2).t(), None) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def num_parts(x: Tensor) -> int:
    """How many parts of the tokens of (B, N, C) inference on the CPU takes one after the other.

    What a linear layer puts out then stays in the cache until it has been used: 137 ms instead of
    154 for the feed-forward layer of 4101 tokens (two cores of an Intel Xeon, model 207).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or is_building_graph():
        return 1
    return math.ceil(x.shape[:-1].numel() / _PART_TOKENS)


def by_parts(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` of a layer that looks at every token of (B, N, C) by itself."""
    parts = num_parts(x)
    if parts == 1:
        return layer(x)
    return torch.cat([layer(part) for part in x.chunk(parts, dim=1)], dim=1)


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of two matrices."""
    if a.dtype == torch.float32:
        return _product(a, b, None)
    return a @ b.t()


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, Nq, D) over (B, H, Nk, D), one head and chunk after the other.

    The backward pass recomputes the scores (FlashAttention, arXiv 2205.14135, section 3.1), so that
    memory grows with the number of tokens, not with its square.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _AttendByHeads.apply(q, k, v)
    return _attend_by_heads(q, k, v)


def _attend_by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            query, key = q[b, h] * scale, k[b, h].contiguous()
            value_t = v[b, h].t().contiguous()
            for rows, chunk in zip(out[b, h].split(_CHUNK), query.split(_CHUNK), strict=True):
                weights = _times_transposed(chunk, key).softmax(-1)
                rows.copy_(_times_transposed(weights, value_t))
    return out


class _AttendByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _attend_by_heads(q, k, v)
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

"""Softmax attention of a few queries over keys that come one part after the other."""

import torch
from torch import Tensor


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

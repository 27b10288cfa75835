"""Pooling tokens into one embedding by attention."""

import torch
from torch import Tensor, nn

from .attention import attend
from .mlp import FeedForward


class AttentionPool(nn.Module):
    """A learned query that attends to all tokens, then a feed-forward layer (CoCa, SigLIP, PE)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = FeedForward(dim, mlp_dim)
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, C)."""
        q = self.q(self.latent).unflatten(-1, (self.num_heads, -1)).expand(x.shape[0], -1, -1, -1)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        x = self.proj(attend(q, k, v).flatten(2))
        return (x + self.mlp(self.norm(x)))[:, 0]

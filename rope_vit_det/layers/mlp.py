"""The feed-forward halves of an encoder block, and the scale of a residual branch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """Linear, GELU, linear: (..., dim) to (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        # The places, and so the names in a checkpoint, are those of torchvision's MLP.
        self.add_module("0", nn.Linear(dim, hidden_dim))
        self.add_module("1", nn.GELU())
        self.add_module("3", nn.Linear(hidden_dim, dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, norm: nn.Module | None = None) -> None:
        """
        Args:
            norm: over ``hidden_dim`` channels, before the last linear layer (EVA-02, section 2.1).
        """
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden_dim)
        self.fc1_x = nn.Linear(dim, hidden_dim)
        self.norm = nn.Identity() if norm is None else norm
        self.fc2 = nn.Linear(hidden_dim, dim)
        # Gates start open, as in timm's SwiGLU.
        nn.init.normal_(self.fc1_g.weight, std=1e-6)
        nn.init.ones_(self.fc1_g.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class LayerScale(nn.Module):
    """A learned scale per channel of a residual branch (CaiT, arXiv 2103.17239, section 2)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

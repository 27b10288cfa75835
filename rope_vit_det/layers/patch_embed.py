"""The patch stem at any stride, and the position table at any grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graphs import is_building_graph


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches to tokens, at a stride other than the kernel that was trained.

    The kernel is resampled in the forward pass, so parameter, gradient and checkpoint keep the
    trained size: the pseudo-inverse resize of FlexiViT (arXiv 2212.08013, section 3.4), which gives
    patches that were upsampled by the same factor exactly their old tokens.
    """

    def __init__(
        self, in_channels: int, dim: int, patch_size: int, stride: int, bias: bool = True
    ) -> None:
        """
        Args:
            patch_size: height and width of the trained kernel, in pixels.
            stride: pixels between (and size of) the patches that are taken from an image.
        """
        super().__init__(in_channels, dim, patch_size, stride=stride, bias=bias)
        self.patch_stride = stride
        matrix = None if stride == patch_size else pseudo_inverse_resize(patch_size, stride)
        # Under `torch.device("cuda")`. Nothing fills it again that was on the meta device.
        if matrix is not None and not self.weight.is_meta:
            matrix = matrix.to(self.weight.device)
        self.resize_matrix: Tensor | None
        self.register_buffer("resize_matrix", matrix, persistent=False)
        nn.init.trunc_normal_(self.weight, std=math.sqrt(1 / self.weight[0].numel()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), both multiples of the stride, to (B, dim, H / stride, W / stride)."""
        weight = self.weight
        if self.resize_matrix is not None:
            weight = resample_kernel(weight, self.resize_matrix)
        return F.conv2d(x, weight, self.bias, stride=self.patch_stride)


def pseudo_inverse_resize(old: int, new: int) -> Tensor:
    """The matrix (new, old) that takes a kernel axis of ``old`` pixels to ``new`` pixels.

    With B the matrix of the bicubic resize of a signal (with antialiasing, as in FlexiViT), it is
    the transposed pseudo-inverse of B. Resizing is separable, so one axis is enough.
    """
    impulses = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]  # one a row
    resized = F.interpolate(impulses, size=(old, new), mode="bicubic", antialias=True)
    return torch.linalg.pinv(resized[0, 0]).float()


def resample_kernel(weight: Tensor, matrix: Tensor) -> Tensor:
    """A (out, in, old, old) kernel, resampled along both axes by ``matrix`` (new, old)."""
    return matrix @ weight @ matrix.T


def interpolate_position_table(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_special_tokens: int,
    *,
    antialias: bool = False,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Brings a learned absolute position table to another grid.

    Args:
        table: (1, S + h*w, C), the entries of the special tokens first.
        old_grid: the (h, w) of the table.
        new_grid: the (h, w) that is wanted.
        num_special_tokens: S; their entries stay as they are.
        antialias: birder's networks do without in the forward pass, and with it where a table is
            resampled for good; timm's do with it in both.
        tile: the (h, w) to which the table is interpolated, and in which it is then repeated over
            the grid; None: it is interpolated over the whole of it. Where a tile is a window, every
            window sees the table as it was pretrained, instead of a piece of a stretched one:
            interpolation is harmful under windows ("Window Attention is Bugged", arXiv 2311.05613,
            section 3). Tiles start at the top left; those that cross the bottom and right edge are
            cropped, as windows are. Along an axis that is shorter, the tile is as long as the axis.

    Returns:
        Tensor: (1, S + new_h*new_w, C), bicubic, in the table's dtype.
    """
    side = new_grid if tile is None else (min(tile[0], new_grid[0]), min(tile[1], new_grid[1]))
    # In a graph for many sizes, it is interpolated onto itself.
    is_kept = not is_building_graph() and old_grid == side
    if is_kept and side == new_grid:
        return table
    special, grid = table[:, :num_special_tokens], table[:, num_special_tokens:]
    grid = grid.unflatten(1, old_grid)  # (1, h, w, C)
    if not is_kept:
        grid = grid.permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=side, mode="bicubic", antialias=antialias)
        grid = grid.to(table.dtype).permute(0, 2, 3, 1)
    if tile is not None and side != new_grid:
        num_tiles = [-(-size // step) for size, step in zip(new_grid, side, strict=True)]
        grid = grid.repeat(1, *num_tiles, 1)[:, : new_grid[0], : new_grid[1]]
    return torch.cat((special, grid.flatten(1, 2)), dim=1)

"""Rotary position embedding over 2-D grids: from a grid to its tables, and turning q and k.

Su et al., "RoFormer" (arXiv 2104.09864), on images as in Heo et al., "Rotary Position Embedding
for Vision Transformer" (arXiv 2403.13298, section 3.2, axial frequencies).
"""

import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from .graphs import is_building_graph
from .windows import to_windows

Rotation = Literal["halves", "interleaved"]
Indexing = Literal["ij", "xy"]


class RotaryEmbedding2D(nn.Module):
    """Builds, and remembers, the rotary tables of the grids it meets.

    It holds no parameters and no buffers: tables are derived data, kept out of the state dict.
    """

    # One image size needs two tables (global and windowed blocks); multi-scale training and
    # test-time augmentation visit a few dozen sizes over and over.
    max_cached_tables = 64
    # Of 2048 px, one table has 8 MiB.
    max_cached_bytes = 64 * 2**20

    def __init__(
        self,
        head_dim: int,
        *,
        temperature: float = 100.0,
        indexing: Indexing = "ij",
        offset: int = 0,
        rotation: Rotation = "halves",
    ) -> None:
        """
        Args:
            head_dim: channels of one attention head, a multiple of 4: a quarter as many frequency
                bands per axis.
            temperature: wavelengths run geometrically from 2*pi to 2*pi*temperature cells.
            indexing: "ij" puts the bands of y before those of x, "xy" the other way round.
            offset: position of the first cell along each axis.
            rotation: "halves" turns channel i together with i + head_dim/2, "interleaved" turns
                neighbouring channels.
        """
        super().__init__()
        if head_dim % 4 != 0:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        self.head_dim = head_dim
        self.temperature = temperature
        self.indexing = indexing
        self.offset = offset
        self.rotation = rotation
        self._tables: OrderedDict[tuple, Tensor] = OrderedDict()

    def forward(
        self,
        grid: tuple[int, int],
        *,
        window: tuple[int, int] | None = None,
        windowed_order: tuple[int, int] | None = None,
        pt_grid_size: tuple[int, int] | None = None,
        num_special_tokens: int = 0,
        scale: Tensor | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """The table that :func:`apply_rotary` takes.

        Args:
            grid: (h, w) of the patch tokens.
            window: (h, w) of the windows in which positions restart at 0, each at most the grid;
                None: positions run over the whole grid.
            windowed_order: (h, w) of the windows by which the tokens are ordered
                (:func:`~rope_vit_det.layers.windows.to_windows`); None: row by row.
            pt_grid_size: (h, w) onto which the positions of a whole grid (or window) are scaled;
                None: positions count 0, 1, 2, …
            num_special_tokens: leading tokens that are not turned.
            scale: a factor on all positions, as of :func:`random_scale`.

        Returns:
            Tensor: (2, num_special_tokens + h*w, head_dim), cosines and signed sines.
        """
        key = (grid, window, windowed_order, pt_grid_size, num_special_tokens, device, dtype)
        if scale is not None:  # good for one forward pass
            with torch.no_grad():
                return self._build(*key, scale)
        if is_building_graph():
            return self._build(*key)
        table = self._tables.get(key)
        if table is None:
            # A table built under inference_mode could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                table = self._tables[key] = self._build(*key)
            self._forget_oldest()
        else:
            self._tables.move_to_end(key)
        return table

    def _forget_oldest(self) -> None:
        size = sum(table.nbytes for table in self._tables.values())
        while len(self._tables) > 1 and (
            len(self._tables) > self.max_cached_tables or size > self.max_cached_bytes
        ):
            size -= self._tables.popitem(last=False)[1].nbytes

    def _build(
        self,
        grid: tuple[int, int],
        window: tuple[int, int] | None,
        windowed_order: tuple[int, int] | None,
        pt_grid_size: tuple[int, int] | None,
        num_special_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        scale: Tensor | None = None,
    ) -> Tensor:
        angles = self._angles(grid, window, pt_grid_size, device)  # (h, w, head_dim)
        if scale is not None:
            angles = angles * scale
        if windowed_order is not None:
            angles = to_windows(angles[None], windowed_order)[0]  # (h*w, head_dim)
        else:
            angles = angles.flatten(0, 1)
        sign = torch.ones(self.head_dim, device=device)
        if self.rotation == "halves":
            sign[: self.head_dim // 2] = -1.0
        else:
            sign[::2] = -1.0
        table = torch.stack((angles.cos(), angles.sin() * sign))
        # Cosine 1 and sine 0 leave the special tokens as they are, without a split and a concat.
        special = table.new_zeros(2, num_special_tokens, self.head_dim)
        special[0] = 1.0
        return torch.cat((special, table), dim=1).to(dtype)

    def _angles(
        self,
        grid: tuple[int, int],
        window: tuple[int, int] | None,
        pt_grid_size: tuple[int, int] | None,
        device: torch.device,
    ) -> Tensor:
        num_bands = self.head_dim // 4
        exponent = torch.arange(num_bands, device=device) / num_bands
        bands = 1.0 / self.temperature**exponent
        axes = []
        for axis, size in enumerate(grid):
            span = size if window is None else window[axis]
            cells = torch.arange(size, device=device)
            if window is not None:
                cells = cells % span
            cells = cells + self.offset
            axes.append(cells / span * (span if pt_grid_size is None else pt_grid_size[axis]))
        y, x = torch.meshgrid(*axes, indexing="ij")
        coords = torch.stack((y, x) if self.indexing == "ij" else (x, y), dim=-1)  # (h, w, 2)
        # Each angle stands twice in a row, also where the rotation then pairs halves: that mixture
        # is birder's, and the published weights were trained with it.
        return (coords[..., None] * bands).flatten(-2).repeat_interleave(2, dim=-1)

    def __getstate__(self) -> dict:
        # Copies and pickles of a model need no tables: they are rebuilt on demand.
        return {**self.__dict__, "_tables": OrderedDict()}

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, temperature={self.temperature}, "
            f"indexing={self.indexing!r}, offset={self.offset}, rotation={self.rotation!r}"
        )


def random_scale(most: float, device: torch.device) -> Tensor:
    """A factor for the positions of one training step: log-uniform in [1 / most, most].

    DINOv3's "RoPE-box jittering" (arXiv 2508.10104, section 3.2; `rescale_coords` in its code,
    2 in its released configs): one factor for both axes. It makes a network robust to resolutions
    and aspect ratios. There positions are centred; ours begin at 0, and so does the scaling.

    Returns:
        Tensor: (1,), float32.
    """
    limit = math.log(most)
    return torch.empty(1, device=device).uniform_(-limit, limit).exp()


def apply_rotary(x: Tensor, table: Tensor, rotation: Rotation, *, in_place: bool = False) -> Tensor:
    """Turns query or key vectors by the positions of their tokens.

    Args:
        x: (B, N, ..., head_dim).
        table: (2, N, head_dim) from :class:`RotaryEmbedding2D`.
        rotation: as the table was built for.
        in_place: writes the result into ``x``.

    Returns:
        Tensor: the shape and dtype of ``x``.
    """
    shape = (table.shape[1],) + (1,) * (x.dim() - 3) + (table.shape[2],)
    cos, sin = table[0].view(shape), table[1].view(shape)
    if rotation == "halves":
        partner = x.roll((x.shape[-1] // 2,), dims=(-1,))
    else:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = x.mul_(cos) if in_place else x * cos
    return turned.addcmul_(partner, sin)

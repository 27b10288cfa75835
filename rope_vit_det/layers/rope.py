"""Rotary position embedding over 2-D grids: from a grid to its tables, and turning q and k.

Su et al., "RoFormer" (arXiv 2104.09864), on images as in Heo et al., "Rotary Position Embedding
for Vision Transformer" (arXiv 2403.13298, section 3.2, axial frequencies).
"""

import math
from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .graphs import is_building_graph, is_capturing
from .windows import to_windows

Rotation = Literal["halves", "interleaved"]
Angles = Literal["repeated", "tiled"]
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
        angles: Angles = "repeated",
        unit_grid: tuple[int, int] | None = None,
        learned: bool = False,
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
            angles: "repeated" has each angle for two neighbouring channels, "tiled" all of them for
                the first half of the channels, and again for the second. Only "interleaved" with
                "repeated" and "halves" with "tiled" turn both channels of a pair by one angle;
                birder's networks mix "halves" with "repeated".
            unit_grid: positions run from the centre of the grid, in which this many cells (h, w)
                span -1 to 1, and angles are 2*pi times as large (DINOv3, arXiv 2508.10104, section
                3.2). None: positions are the cells' indices.
            learned: the blocks have frequencies of their own
                (:class:`~rope_vit_det.layers.attention.RotaryAttention`), and get the positions.
        """
        super().__init__()
        if head_dim % 4 != 0:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        self.head_dim = head_dim
        self.temperature = temperature
        self.indexing = indexing
        self.offset = offset
        self.rotation = rotation
        self.angles = angles
        self.unit_grid = unit_grid
        self.learned = learned
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

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
            Tensor: (2, num_special_tokens + h*w, head_dim), cosines and signed sines; of learned
            frequencies the positions, (1, num_special_tokens + h*w, 2), float32.
        """
        key = (grid, window, windowed_order, pt_grid_size, num_special_tokens, device, dtype)
        if scale is not None or is_building_graph():  # good for one forward pass
            return self._build(*key, scale)
        # A CUDA graph reads no table that may be forgotten; its own has values when it is replayed.
        is_remembered = not is_capturing(device)
        if key not in self._tables or not is_remembered:
            # A table built under inference_mode could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                table = self._build(*key)
            if not is_remembered:
                return table
            self._tables[key] = table
            self._forget_oldest()
        self._tables.move_to_end(key)
        return self._tables[key]

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
        coords = self._positions(grid, window, pt_grid_size, device)  # (h, w, 2)
        if scale is not None:
            coords = coords * scale
        if windowed_order is not None:
            coords = to_windows(coords[None], windowed_order)[0]  # (h*w, 2)
        else:
            coords = coords.flatten(0, 1)
        # At position 0 nothing is turned: special tokens need neither a split nor a concat later.
        coords = torch.cat((coords.new_zeros(num_special_tokens, 2), coords))
        if self.learned:
            return coords[None]
        exponent = torch.arange(self.head_dim // 4, device=device) / (self.head_dim // 4)
        bands = 1.0 / self.temperature**exponent
        if self.unit_grid is not None:
            bands = bands * (2 * math.pi)
        angles = (coords[..., None] * bands).flatten(-2)
        return rotary_table(angles, self.rotation, self.angles).to(dtype)

    def _positions(
        self,
        grid: tuple[int, int],
        window: tuple[int, int] | None,
        pt_grid_size: tuple[int, int] | None,
        device: torch.device,
    ) -> Tensor:
        axes = []
        for axis, size in enumerate(grid):
            span = size if window is None else window[axis]
            cells = torch.arange(size, device=device)
            if window is not None:
                cells = cells % span
            cells = cells + self.offset
            length = span if pt_grid_size is None else pt_grid_size[axis]
            if self.unit_grid is None:
                axes.append(cells / span * length)
            else:
                axes.append((2 * ((cells + 0.5) / span) - 1) * (length / self.unit_grid[axis]))
        y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack((y, x) if self.indexing == "ij" else (x, y), dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model need no tables: they are rebuilt on demand.
        return {**self.__dict__, "_tables": OrderedDict()}

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, temperature={self.temperature}, "
            f"indexing={self.indexing!r}, offset={self.offset}, rotation={self.rotation!r}, "
            f"angles={self.angles!r}, unit_grid={self.unit_grid}, learned={self.learned}"
        )


def rotary_table(angles: Tensor, rotation: Rotation, order: Angles) -> Tensor:
    """The table that :func:`apply_rotary` takes.

    Args:
        angles: (..., head_dim / 2).
        order: of the angles over the channels, see :class:`RotaryEmbedding2D`.

    Returns:
        Tensor: (2, ..., head_dim), cosines and signed sines.
    """
    if order == "tiled":
        angles = torch.cat((angles, angles), dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
    sign = torch.ones(angles.shape[-1], device=angles.device)
    if rotation == "halves":
        sign[: len(sign) // 2] = -1.0
    else:
        sign[::2] = -1.0
    return torch.stack((angles.cos(), angles.sin() * sign))


def random_frequencies(head_dim: int, num_heads: int, temperature: float) -> Tensor:
    """Frequencies of a block to start learning from, each head's axes turned at random.

    "RoPE-Mixed" (arXiv 2403.13298, section 3.2).

    Returns:
        Tensor: (2, num_heads, head_dim / 2), of the two coordinates.
    """
    bands = 1.0 / temperature ** (torch.arange(head_dim // 4) / (head_dim // 4))
    turns = torch.rand(num_heads, 1) * 2 * math.pi + torch.tensor([[0.0], [math.pi / 2]])[:, None]
    both = torch.stack((turns.cos() * bands, turns.sin() * bands))  # (2, 2, num_heads, bands)
    return both.transpose(1, 2).flatten(2)


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
        table: (2, N, head_dim), or (2, N, num_heads, head_dim), of :func:`rotary_table`.
        rotation: as the table was built for.
        in_place: writes the result into ``x``.

    Returns:
        Tensor: the shape and dtype of ``x``.
    """
    shape = (table.shape[1],) + (1,) * (x.dim() - table.dim()) + table.shape[2:]
    cos, sin = table[0].view(shape), table[1].view(shape)
    if rotation == "halves":
        partner = x.roll((x.shape[-1] // 2,), dims=(-1,))
    else:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = x.mul_(cos) if in_place else x * cos
    return turned.addcmul_(partner, sin)

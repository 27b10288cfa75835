"""A slow, plain forward pass of a windowed RoPE ViT, written from the state dict alone.

It shares no code with the package: tokens stay row by row, windows are an explicit attention mask,
rotary angles are built cell by cell with Python loops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def neck(
    state: dict[str, Tensor],
    image: Tensor,
    *,
    patch: int,
    heads: int,
    pos_grid: tuple[int, int],
    window: int = 0,
    global_blocks: tuple[int, ...] = (),
    pt_grid_size: tuple[int, int] | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """The neck of a default-style network (LayerNorm, GELU, class token) at its own stride.

    ``tile``: the absolute position table is repeated in tiles of this size, not interpolated.
    """
    x = F.conv2d(image, state["conv_proj.weight"], state["conv_proj.bias"], stride=patch)
    batch, dim, h, w = x.shape
    special = [state[k] for k in ("reg_tokens", "class_token") if k in state]
    special = torch.cat(special, dim=1).expand(batch, -1, -1)
    s = special.shape[1]
    pos = state["pos_embedding"]
    grid = pos[0, s:].T.reshape(1, dim, *pos_grid)
    if tile is None:
        grid = F.interpolate(grid, size=(h, w), mode="bicubic")
    else:
        th, tw = min(tile[0], h), min(tile[1], w)
        grid = F.interpolate(grid, size=(th, tw), mode="bicubic")
        rows = [torch.stack([grid[..., y % th, x % tw] for x in range(w)], -1) for y in range(h)]
        grid = torch.stack(rows, dim=-2)
    grid = grid.reshape(dim, h * w).T
    x = x.reshape(batch, dim, h * w).permute(0, 2, 1) + grid
    x = torch.cat((special + pos[:, :s], x), dim=1)
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.block."))
    for i in range(depth):
        p = f"encoder.block.{i}."
        windowed = window > 0 and i not in global_blocks
        wh, ww = (min(window, h), min(window, w)) if windowed else (h, w)
        y = F.layer_norm(x, (dim,), state[p + "norm1.weight"], state[p + "norm1.bias"], 1e-6)
        qkv = y @ state[p + "attn.qkv.weight"].T + state[p + "attn.qkv.bias"]
        q, k, v = (
            t.reshape(batch, -1, heads, dim // heads).transpose(1, 2) for t in qkv.chunk(3, dim=-1)
        )
        q, k = (_rotate(t, s, (h, w), (wh, ww), pt_grid_size) for t in (q, k))
        # One head's scores at a time, again in the backward pass: together they are gigabytes.
        mask = _mask(s, (h, w), (wh, ww))
        each = zip(*(t.unbind(1) for t in (q, k, v)), strict=True)
        y = torch.cat([checkpoint(_attend, *t, mask, use_reentrant=False) for t in each], dim=-1)
        x = x + y @ state[p + "attn.proj.weight"].T + state[p + "attn.proj.bias"]
        y = F.layer_norm(x, (dim,), state[p + "norm2.weight"], state[p + "norm2.bias"], 1e-6)
        y = F.gelu(y @ state[p + "mlp.0.weight"].T + state[p + "mlp.0.bias"])
        x = x + y @ state[p + "mlp.3.weight"].T + state[p + "mlp.3.bias"]
    return x[:, s:].transpose(1, 2).reshape(batch, dim, h, w)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def _mask(s: int, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(S + N, S + N): True where attention is allowed."""
    ids = [
        y // window[0] * grid[1] + x // window[1] for y in range(grid[0]) for x in range(grid[1])
    ]
    ids = torch.tensor(ids)
    mask = torch.ones(s + len(ids), s + len(ids), dtype=torch.bool)
    mask[s:, s:] = ids[:, None] == ids[None, :]
    return mask


def _rotate(t, s, grid, window, pt_grid_size):
    head_dim = t.shape[-1]
    bands = [100.0 ** -(i / (head_dim // 4)) for i in range(head_dim // 4)]
    rows = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            py, px = y % window[0], x % window[1]
            if pt_grid_size is not None:
                py = py * pt_grid_size[0] / window[0]
                px = px * pt_grid_size[1] / window[1]
            angles = [py * b for b in bands for _ in (0, 1)]
            rows.append(angles + [px * b for b in bands for _ in (0, 1)])
    angles = torch.tensor(rows, dtype=t.dtype)
    first, second = t[:, :, s:].chunk(2, dim=-1)
    turned = t[:, :, s:] * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((t[:, :, :s], turned), dim=2)

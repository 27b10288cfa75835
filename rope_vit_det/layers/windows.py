"""Ordering the tokens of a grid by windows, so that every window is a contiguous run of tokens.

Attention over all tokens does not care about their order, so one reordering before the first
block serves every block, and windowed attention needs neither padding nor a mask: a grid that the
window does not divide has smaller windows along its bottom and right edges, as a run of their own.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class WindowGroup(NamedTuple):
    """A run of windows of one size. Their tokens stand one window after the other."""

    start: int  # index of the first token
    num_windows: int
    window_tokens: int


_Region = tuple[slice, slice, tuple[int, int], tuple[int, int]]


def _regions(grid: tuple[int, int], window: tuple[int, int]) -> Iterator[_Region]:
    """The up to four parts of a grid (inner, right, bottom, corner) with one window size each.

    Of each its rows and columns, and the size and number of its windows along both.
    """

    def split(size: int, w: int) -> list[tuple[slice, int, int]]:
        whole = size // w * w
        parts = [(slice(0, whole), w, size // w)] if whole else []
        return parts + ([(slice(whole, size), size - whole, 1)] if size > whole else [])

    for rows, wh, nh in split(grid[0], window[0]):
        for cols, ww, nw in split(grid[1], window[1]):
            yield rows, cols, (wh, ww), (nh, nw)


def window_groups(grid: tuple[int, int], window: tuple[int, int]) -> list[WindowGroup]:
    """The windows of a grid, in the order that :func:`to_windows` brings them.

    Args:
        grid: (h, w) in tokens.
        window: (h, w) of one window, each at least 1.
    """
    groups, start = [], 0
    for _, _, (wh, ww), (nh, nw) in _regions(grid, window):
        groups.append(WindowGroup(start, nh * nw, wh * ww))
        start += nh * nw * wh * ww
    return groups


def num_tokens(windows: Sequence[WindowGroup]) -> int:
    """Of all these windows together."""
    return sum(num * tokens for _, num, tokens in windows)


def window_parts(windows: Sequence[WindowGroup], num_parts: int) -> list[list[WindowGroup]]:
    """The windows in up to ``num_parts`` runs of nearly the same number of tokens.

    A window belongs where its middle lies; runs without one are left out.
    """
    total = num_tokens(windows)
    edges = [total * i / num_parts for i in range(num_parts + 1)]
    parts = []
    for ends in pairwise(edges):
        part = []
        for start, num, tokens in windows:
            first, last = (
                min(max(math.ceil((end - start) / tokens - 0.5), 0), num) for end in ends
            )
            if first < last:
                part.append(WindowGroup(start + first * tokens, last - first, tokens))
        if part:
            parts.append(part)
    return parts


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, h, w, C) to (B, h*w, C), window by window."""
    parts = []
    for rows, cols, (wh, ww), (nh, nw) in _regions((x.shape[1], x.shape[2]), window):
        part = x[:, rows, cols].unflatten(2, (nw, ww)).unflatten(1, (nh, wh))
        parts.append(part.transpose(2, 3).flatten(1, 4))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def from_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, h*w, C) as :func:`to_windows` orders it, back to (B, h, w, C)."""
    out = x.new_empty(x.shape[0], *grid, x.shape[2])
    start = 0
    for rows, cols, (wh, ww), (nh, nw) in _regions(grid, window):
        tokens = nh * nw * wh * ww
        part = x[:, start : start + tokens].unflatten(1, (nh, nw, wh, ww))
        out[:, rows, cols] = part.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        start += tokens
    return out

"""Rotary positions, windows, attention and resampling on any grid, against naive references."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from rope_vit_det.layers.attention import attend, attend_windows
from rope_vit_det.layers.cpu import RunningAttention
from rope_vit_det.layers.patch_embed import (
    PatchEmbed,
    interpolate_position_table,
    pseudo_inverse_resize,
    resample_kernel,
)
from rope_vit_det.layers.rope import RotaryEmbedding2D, apply_rotary
from rope_vit_det.layers.windows import from_windows, to_windows, window_groups, window_parts

SIDES = st.integers(1, 11)
GRIDS = st.tuples(SIDES, SIDES)
SEEDS = st.integers(0, 2**31)
# Relative to the largest value; queries, keys and values are rounded to the dtype before.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = st.sampled_from(list(TOLERANCE))


def _normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def grids_with_windows(draw):
    grid = draw(GRIDS)
    return grid, (draw(st.integers(1, grid[0])), draw(st.integers(1, grid[1])))


def _window_order(grid, window):
    """Cells (y, x) in the order that windowed tokens have: inner, right, bottom, corner windows."""

    def runs(size, w):
        whole = size // w * w
        return [run for run in (range(0, whole, w), range(whole, size, w)) if len(run)]

    cells = []
    for tops in runs(grid[0], window[0]):
        for lefts in runs(grid[1], window[1]):
            for top in tops:
                for left in lefts:
                    for y in range(top, min(top + window[0], grid[0])):
                        for x in range(left, min(left + window[1], grid[1])):
                            cells.append((y, x))
    return cells


@given(grids_with_windows(), st.integers(1, 3), st.integers(1, 4))
def test_windows_go_there_and_back(case, batch, dim):
    grid, window = case
    x = torch.arange(batch * grid[0] * grid[1] * dim).reshape(batch, *grid, dim)
    tokens = to_windows(x, window)
    order = _window_order(grid, window)
    assert torch.equal(tokens, torch.stack([x[:, y, x_] for y, x_ in order], dim=1))
    assert torch.equal(from_windows(tokens, grid, window), x)
    # The groups are runs of whole windows that cover all tokens.
    numbers = [(y // window[0], x // window[1]) for y, x in order]
    end = 0
    for start, num, size in window_groups(grid, window):
        assert start == end
        for i in range(num):
            members = set(numbers[start + i * size : start + (i + 1) * size])
            assert len(members) == 1 and numbers.count(members.pop()) == size
        end = start + num * size
    assert end == len(order)


@st.composite
def rotary_cases(draw):
    grid, window = draw(grids_with_windows())
    return {
        "grid": grid,
        "window": draw(st.sampled_from([None, window])),
        "ordered": draw(st.booleans()),
        "order": window,
        "pt_grid_size": draw(st.none() | st.tuples(SIDES, SIDES)),
        "special": draw(st.integers(0, 5)),
        "head_dim": 4 * draw(st.integers(1, 16)),
        "heads": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 3)),
        "temperature": draw(st.sampled_from([100.0, 10000.0])),
        "indexing": draw(st.sampled_from(["ij", "xy"])),
        "offset": draw(st.integers(0, 2)),
        "rotation": draw(st.sampled_from(["halves", "interleaved"])),
        "dtype": draw(DTYPES),
        "seed": draw(SEEDS),
    }


@given(rotary_cases())
def test_rotation_equals_cell_by_cell(case):
    """Angles and rotation with Python floats."""
    dim, grid = case["head_dim"], case["grid"]
    rope = RotaryEmbedding2D(
        dim,
        temperature=case["temperature"],
        indexing=case["indexing"],
        offset=case["offset"],
        rotation=case["rotation"],
    )
    arguments = {
        "window": case["window"],
        "windowed_order": case["order"] if case["ordered"] else None,
        "pt_grid_size": case["pt_grid_size"],
        "num_special_tokens": case["special"],
        "device": torch.device("cpu"),
        "dtype": case["dtype"],
    }
    table = rope(grid, **arguments)
    assert rope(grid, **arguments) is table
    rows = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    cells = _window_order(grid, case["order"]) if case["ordered"] else rows
    x = _normal(
        case["seed"],
        case["batch"],
        case["special"] + len(cells),
        case["heads"],
        dim,
        dtype=case["dtype"],
    )
    span = case["window"] or grid
    scaled = case["pt_grid_size"] or span
    expected = x.double().clone()
    for token, cell in enumerate(cells, start=case["special"]):
        position = [
            (cell[axis] % span[axis] + case["offset"]) / span[axis] * scaled[axis]
            for axis in (0, 1)
        ]
        if case["indexing"] == "xy":
            position.reverse()
        bands = [case["temperature"] ** -(i / (dim // 4)) for i in range(dim // 4)]
        angles = [p * band for p in position for band in bands for _ in (0, 1)]
        vector = expected[:, token]
        if case["rotation"] == "interleaved":
            pairs = [(i, i + 1) for i in range(0, dim, 2)]
        else:
            pairs = [(i, i + dim // 2) for i in range(dim // 2)]
        turned = vector.clone()
        for a, b in pairs:
            turned[..., a] = vector[..., a] * math.cos(angles[a]) - vector[..., b] * math.sin(
                angles[a]
            )
            turned[..., b] = vector[..., b] * math.cos(angles[b]) + vector[..., a] * math.sin(
                angles[b]
            )
        expected[:, token] = turned
    found = apply_rotary(x, table, case["rotation"])
    assert found.dtype == case["dtype"] and found.shape == x.shape
    # Tables are made in float32.
    tolerance = max(TOLERANCE[case["dtype"]], 1e-5)
    assert relative_difference(found.double(), expected) < tolerance
    assert torch.equal(found[:, : case["special"]], x[:, : case["special"]])


@given(grids_with_windows(), st.integers(1, 12))
def test_parts_are_the_windows_in_their_order_and_nearly_equal(case, num_parts):
    windows = window_groups(*case)
    parts = window_parts(windows, num_parts)
    assert 1 <= len(parts) <= num_parts and all(parts)

    def singles(windows):
        return [(start + i * size, size) for start, num, size in windows for i in range(num)]

    assert [one for part in parts for one in singles(part)] == singles(windows)
    sizes = [sum(size for _, size in singles(part)) for part in parts]
    largest = max(size for _, size in singles(windows))
    assert max(sizes) <= sum(sizes) / num_parts + largest


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.integers(0, 5),
    st.sampled_from([0.1, 1.0, 30.0]),
    DTYPES,
    SEEDS,
)
def test_attention_that_runs_over_parts_is_that_over_all(sizes, queries, scale, dtype, seed):
    q = _normal(seed, 2, queries, 3, 8, dtype=dtype)
    k, v = _normal(seed + 1, 2, 2, sum(sizes), 3, 8, dtype=dtype)
    k = k * scale
    running = RunningAttention(q)
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        for part in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True):
            running.add(*part)
        found = running.result()
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    assert found.dtype == dtype and found.shape == expected.shape
    if queries:
        assert relative_difference(found.double(), expected) < TOLERANCE[dtype]


@given(
    grids_with_windows(),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([4, 16, 64]),
    DTYPES,
    SEEDS,
)
def test_windowed_attention_equals_a_mask(case, special, batch, heads, dim, dtype, seed):
    grid, window = case
    order = _window_order(grid, window)
    q, k, v = _normal(seed, 3, batch, special + len(order), heads, dim, dtype=dtype)
    found = attend_windows(q, k, v, special, window_groups(grid, window))
    numbers = torch.tensor([y // window[0] * 99 + x // window[1] for y, x in order])
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    mask[special:, special:] = numbers[:, None] == numbers
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / math.sqrt(dim)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v.double())
    assert found.dtype == dtype
    assert relative_difference(found.double(), expected) < TOLERANCE[dtype]


@given(
    st.integers(1, 70),
    st.integers(1, 1300),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([8, 64]),
    DTYPES,
    SEEDS,
)
def test_attention_equals_a_softmax(queries, keys, batch, heads, dim, dtype, seed):
    q = _normal(seed, batch, queries, heads, dim, dtype=dtype)
    k, v = _normal(seed + 1, 2, batch, keys, heads, dim, dtype=dtype)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / math.sqrt(dim)
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    with torch.inference_mode():
        assert relative_difference(attend(q, k, v).double(), expected) < TOLERANCE[dtype]


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 3), SEEDS)
def test_kernels_are_resampled_as_in_timm(old, new, dim, seed):
    weight = _normal(seed, dim, 3, old, old)
    ours = resample_kernel(weight, pseudo_inverse_resize(old, new))
    theirs = resample_patch_embed(weight, [new, new])
    assert relative_difference(ours, theirs) < 1e-4
    if new >= old:  # patches that were enlarged as much give their old tokens
        patch = _normal(seed + 1, 2, 3, old, old)
        enlarged = F.interpolate(patch, size=(new, new), mode="bicubic", antialias=True)
        tokens = F.conv2d(patch, weight)
        assert relative_difference(F.conv2d(enlarged, ours), tokens) < 1e-3


@given(GRIDS, st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.booleans(), SEEDS)
def test_the_stem_sees_patch_by_patch(grid, old, stride, batch, bias, seed):
    stem = PatchEmbed(3, 5, old, stride, bias=bias)
    image = _normal(seed, batch, 3, grid[0] * stride, grid[1] * stride)
    found = stem(image)
    assert found.shape == (batch, 5, *grid)
    kernel = resample_patch_embed(stem.weight.detach(), [stride, stride])
    y, x = grid[0] - 1, grid[1] // 2
    patch = image[:, :, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride]
    token = torch.einsum("bcij,ocij->bo", patch, kernel)
    if bias:
        token = token + stem.bias.detach()
    assert torch.allclose(found[..., y, x], token, atol=1e-4 * float(token.abs().max() + 1e-3))


@given(GRIDS, GRIDS, st.integers(0, 5), st.booleans(), DTYPES, SEEDS)
def test_position_tables_are_resampled_as_in_timm(old, new, special, antialias, dtype, seed):
    # timm leaves a table alone where only the number of cells is the same.
    assume(old == new or old[0] * old[1] != new[0] * new[1])
    assume(dtype != torch.float64)  # which both interpolate in float32
    table = _normal(seed, 1, special + old[0] * old[1], 6, dtype=dtype)
    ours = interpolate_position_table(table, old, new, special, antialias=antialias)
    theirs = resample_abs_pos_embed(
        table, list(new), list(old), num_prefix_tokens=special, antialias=antialias
    )
    assert ours.dtype == dtype
    assert relative_difference(ours.float(), theirs.float()) < TOLERANCE[dtype]
    assert torch.equal(ours[:, :special], table[:, :special])


@given(GRIDS, GRIDS, GRIDS, st.integers(0, 5), SEEDS)
def test_tiled_tables_repeat_the_tile(old, new, tile, special, seed):
    table = _normal(seed, 1, special + old[0] * old[1], 6)
    found = interpolate_position_table(table, old, new, special, tile=tile)
    assert found.shape == (1, special + new[0] * new[1], 6)
    height, width = min(tile[0], new[0]), min(tile[1], new[1])
    one = interpolate_position_table(table, old, (height, width), special)
    for y in range(new[0]):
        for x in range(new[1]):
            expected = one[:, special + y % height * width + x % width]
            assert torch.equal(found[:, special + y * new[1] + x], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), SEEDS)
def test_images_of_a_batch_do_not_meet(dtype, batch, tokens, heads, seed):
    q, k, v = _normal(seed, 3, batch, tokens, heads, 16, dtype=dtype)
    together = attend(q, k, v)
    for i in range(batch):
        alone = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1])
        assert relative_difference(together[i : i + 1].float(), alone.float()) < TOLERANCE[dtype]

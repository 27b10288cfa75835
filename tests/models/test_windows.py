"""Windowed attention against a naive masked forward pass."""

import pytest
import torch
from helpers import move_off_initial_values, relative_difference
from reference import neck

from rope_vit_det import create_model
from rope_vit_det.layers import cpu as cpu_kernels


@pytest.mark.parametrize(
    ("grid", "window", "pt_grid_size"),
    [
        ((8, 12), 4, None),  # divides
        ((10, 14), 4, None),  # smaller windows along both edges
        ((10, 14), 4, (16, 16)),
        ((3, 17), 8, (16, 16)),  # window higher than the grid
        ((7, 5), 1, None),  # windows of one token
        ((6, 1), 4, None),  # a grid of one column
        ((1, 11), 4, (16, 16)),  # of one row
        ((1, 1), 4, None),  # of one token
        ((5, 9), 1, (16, 16)),
    ],
)
def test_equals_masked_attention(grid, window, pt_grid_size):
    model = create_model("rope_vit_reg1_t14", window_size=window, pt_grid_size=pt_grid_size)
    _assert_equals_reference(move_off_initial_values(model), grid, pt_grid_size, batch=2)


@pytest.mark.parametrize("pt_grid_size", [None, (16, 16)])
@pytest.mark.slow
def test_equals_masked_attention_at_the_size_of_an_image(pt_grid_size):
    """800 x 1344 px at stride 16, windows of 16: edge windows of 2 x 16, 16 x 4 and 2 x 4."""
    model = create_model("rope_vit_reg4_demo16", window_size=16, pt_grid_size=pt_grid_size)
    model.global_blocks = frozenset({1})
    _assert_equals_reference(
        move_off_initial_values(model), (50, 84), pt_grid_size, batch=1, parts=[1200]
    )


def _assert_equals_reference(model, grid, pt_grid_size, *, batch, parts=(40, 7)):
    patch = model.patch_size
    x = torch.randn(batch, 3, grid[0] * patch, grid[1] * patch)
    args = dict(patch=patch, heads=3, pos_grid=model.pos_grid, window=model.window_size)
    args |= dict(global_blocks=model.global_blocks, pt_grid_size=pt_grid_size)
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = neck(state, x, **args)
    ours = model.detection_features(x)["neck"]
    assert relative_difference(ours, expected) < 1e-5
    for most_tokens in parts:  # inference takes as many at a time
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(cpu_kernels, "_PART_TOKENS", most_tokens)
            by_parts = model.detection_features(x)["neck"]
        assert relative_difference(by_parts, expected) < 1e-5

    weight = torch.randn_like(expected)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for key, parameter in model.named_parameters():
        if state[key].grad is not None:
            assert relative_difference(parameter.grad, state[key].grad) < 1e-5, key


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rope_vit_t14", {}),  # no register tokens
        ("rope_vit_reg1_t14", {"class_token": False}),
        ("rope_vit_reg1_t14", {"class_token": False, "num_reg_tokens": 0}),
        ("rope_vit_reg1_t14", {"mlp_layer": "NormSwiGLU", "attn_norm": True}),
        ("rope_vit_reg1_t14", {"layer_scale_init_value": 0.3, "drop_path_rate": 0.5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_by_parts_equals_the_whole_at_once(monkeypatch, name, arguments, dtype):
    """With a backward pass, all tokens go through at once."""
    model = create_model(name, window_size=4, **arguments)
    move_off_initial_values(model).to(dtype)
    x = torch.randn(2, 3, 10 * 14, 13 * 14, dtype=dtype)
    expected = model.detection_features(x)["neck"].detach()
    monkeypatch.setattr(cpu_kernels, "_PART_TOKENS", 70)
    with torch.no_grad():
        found = model.detection_features(x)["neck"]
    assert relative_difference(found, expected) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_drop_path_in_training_leaves_out_whole_samples_without_a_backward_pass(monkeypatch):
    model = create_model("rope_vit_reg1_t14", window_size=4, global_blocks=[], drop_path_rate=0.9)
    block = move_off_initial_values(model).train().encoder.block[-1]
    seen = []
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    monkeypatch.setattr(cpu_kernels, "_PART_TOKENS", 70)
    with torch.no_grad():
        model.detection_features(torch.randn(16, 3, 8 * 14, 8 * 14))
    (given, out) = seen[0]
    same = (given == out).all(-1)  # (B, N)
    assert same.all(1).any()
    assert torch.equal(same.all(1), same.any(1))


@pytest.mark.parametrize("window", [7, 9, 100])
def test_a_window_that_covers_the_grid_is_global_attention(window):
    windowed = create_model("rope_vit_reg1_t14", window_size=window, global_blocks=[])
    move_off_initial_values(windowed)
    whole = create_model("rope_vit_reg1_t14").eval()
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(1, 3, 7 * 14, 5 * 14)
    with torch.inference_mode():
        expected = whole.detection_features(x)["neck"]
        assert relative_difference(windowed.detection_features(x)["neck"], expected) < 1e-5


def test_embedding_does_not_depend_on_the_order_of_tokens():
    """All blocks global: windows only reorder tokens, which no output may show."""
    model = move_off_initial_values(create_model("rope_vit_reg1_t14", window_size=4))
    model.global_blocks = frozenset(range(11))  # one windowed block keeps the reordering on
    state = model.state_dict()
    x = torch.randn(1, 3, 10 * 14, 6 * 14)
    expected = neck(
        state, x, patch=14, heads=3, pos_grid=(16, 16), window=4, global_blocks=tuple(range(11))
    )
    with torch.inference_mode():
        assert relative_difference(model.detection_features(x)["neck"], expected) < 1e-5


@pytest.mark.parametrize(
    ("grid", "window", "tile"),
    [
        ((10, 14), 4, (4, 4)),  # the table (16 x 16) is interpolated to the window, then repeated
        ((20, 18), 16, (16, 16)),  # each window sees the table itself
        ((20, 10), 16, (16, 10)),  # a window is no wider than the grid, and so is a tile
        ((20, 18), 0, (16, 16)),  # without windows: the table's own grid
        ((7, 5), 40, (7, 5)),  # a window that covers the grid: interpolated, as without tiles
    ],
)
def test_tiled_position_table_equals_the_reference(grid, window, tile):
    model = create_model("rope_vit_reg1_t14", window_size=window, tile_pos_embed=True)
    move_off_initial_values(model)
    x = torch.randn(1, 3, grid[0] * 14, grid[1] * 14)
    args = dict(patch=14, heads=3, pos_grid=(16, 16), window=window, global_blocks=(2, 5, 8, 11))
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = neck(state, x, **args, tile=tile)
    ours = model.detection_features(x)["neck"]
    assert relative_difference(ours, expected) < 1e-5
    weight = torch.randn_like(expected)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    key = "pos_embedding"
    assert relative_difference(model.get_parameter(key).grad, state[key].grad) < 1e-4

    model.tile_pos_embed = False
    with torch.inference_mode():
        interpolated = model.detection_features(x)["neck"]
        assert relative_difference(interpolated, neck(state, x, **args)) < 1e-5
    assert (relative_difference(interpolated, expected) < 1e-5) == (tile == grid)


def test_the_table_of_the_pretraining_grid_is_its_own_tile():
    model = move_off_initial_values(create_model("rope_vit_reg1_t14"))
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model.detection_features(x)["neck"]
        model.tile_pos_embed = True
        assert relative_difference(model.detection_features(x)["neck"], expected) < 1e-5

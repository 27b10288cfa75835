"""`torch.compile` under COMPILE: the eager result, from few graphs, at any size."""

import copy
import pickle

import pytest
import torch
import torch._dynamo
from helpers import move_off_initial_values, relative_difference
from torch._dynamo.utils import counters

from rope_vit_det import create_model

SMALL = dict(name="rope_vit_reg4_demo16")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Builds and guards the graphs, but runs them without generating code for them."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="aot_eager"))


def pair(**kwargs):
    """The same network, compiled and not; its last block alone is global where it has windows."""
    if kwargs.get("window_size"):
        kwargs |= {"global_blocks": [3]}
    model = move_off_initial_values(create_model(**SMALL, compile=True, **kwargs))
    eager = copy.deepcopy(model)
    eager.compiled = False
    return model, eager


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_same(model, eager, batch, height, width, *, tolerance=1e-5):
    x = torch.randn(batch, 3, height * 16, width * 16)
    with torch.inference_mode():
        expected = eager.detection_features(x)["neck"]
        neck = model.detection_features(x)["neck"]
    assert relative_difference(neck, expected) < tolerance, (batch, height, width)


# The first one is as wide as the network (192 tokens with the specials), a square, and the grid of
# pretraining: none of it may be taken for a property of all images.
GRIDS = [(11, 17), (14, 14), (3, 40), (17, 9), (4, 4), (1, 7), (5, 1), (1, 1), (33, 20)]


def test_without_windows_all_sizes_share_one_graph(quick_compiler):
    model, eager = pair()
    for height, width in GRIDS:
        assert_same(model, eager, 2, height, width)
    assert graphs() == 1
    # One more for batches of one image: the compiler always treats a size of 1 by itself.
    for height, width in GRIDS:
        assert_same(model, eager, 1, height, width)
    assert graphs() == 2


@pytest.mark.slow
def test_without_windows_all_sizes_share_one_graph_under_autocast_too(quick_compiler):
    model, eager = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for height, width in [(10, 14), (40, 33), (2, 2)]:
            assert_same(model, eager, 2, height, width, tolerance=1e-2)
    assert graphs() == 1


@pytest.mark.slow
def test_with_windows_sizes_with_the_same_kinds_of_windows_share_a_graph(quick_compiler):
    model, eager = pair(window_size=4)
    for size in [(10, 14), (14, 10), (11, 50)]:  # edge windows right and below
        assert_same(model, eager, 2, *size)
    assert graphs() == 2  # the other one is of the global block
    for size in [(8, 12), (16, 16)]:  # whole windows only
        assert_same(model, eager, 2, *size)
    assert graphs() == 3


@pytest.mark.slow
def test_with_windows_the_graphs_are_bounded(quick_compiler):
    model, eager = pair(window_size=4)
    for height in range(1, 14):
        for width in range(1, 14):
            assert_same(model, eager, 2, height, width)
    few = graphs()
    assert few <= 17
    for size in [(20, 31), (32, 16), (3, 50), (41, 2), (37, 27), (4, 44), (1, 90), (64, 5)]:
        assert_same(model, eager, 2, *size)
    assert graphs() == few


@pytest.mark.slow
def test_pt_grid_size_and_tiles_may_change_without_another_graph(quick_compiler):
    model, eager = pair(window_size=4)
    assert_same(model, eager, 2, 10, 14)
    before = graphs()
    for value in ((16, 16), "count", (7, 9), None):
        model.pt_grid_size = eager.pt_grid_size = value
        model.tile_pos_embed = eager.tile_pos_embed = value is None
        assert_same(model, eager, 2, 10, 14)
    assert graphs() == before


def assert_same_gradients(model, eager, *, tolerance=1e-4):
    x = torch.randn(2, 3, 7 * 16, 10 * 16)
    necks = []
    for net in (model, eager):
        net.train().zero_grad()
        torch.manual_seed(3)
        necks.append(net.detection_features(x)["neck"])
        necks[-1].square().mean().backward()
    assert relative_difference(*necks) < tolerance
    grads = {key: p.grad for key, p in eager.named_parameters() if p.grad is not None}
    assert {k for k, p in model.named_parameters() if p.grad is not None} == set(grads)
    for key, parameter in model.named_parameters():
        if key in grads:
            assert relative_difference(parameter.grad, grads[key]) < tolerance, key


@pytest.mark.parametrize(("window", "checkpointing"), [(0, False), (4, True)])
@pytest.mark.slow
def test_gradients_are_the_eager_ones(quick_compiler, window, checkpointing):
    model, eager = pair(window_size=window, activation_checkpoint=checkpointing)
    assert_same_gradients(model, eager)
    assert graphs() == (2 if window else 1)


def test_rates_share_a_graph_which_is_of_one_size_until_there_is_a_second(quick_compiler):
    model, _ = pair(drop_path_rate=0.3)
    assert len({block.drop_path.p for block in model.encoder.block}) == 4
    model.train()
    for (height, width), total in (((7, 10), 1), ((7, 10), 1), ((9, 6), 2), ((5, 5), 2)):
        neck = model.detection_features(torch.randn(2, 3, height * 16, width * 16))["neck"]
        neck.square().mean().backward()
        assert graphs() == total
    model.eval()
    for height, width in ((7, 10), (4, 9)):
        with torch.inference_mode():
            model.detection_features(torch.randn(2, 3, height * 16, width * 16))
    assert graphs() == 3


@pytest.mark.slow
def test_generated_code_gives_the_eager_result():
    """Inductor, forward and backward, with what draws random numbers in training."""
    model, eager = pair(window_size=4, drop_path_rate=0.3, rescale_coords=2.0)
    with torch._inductor.config.patch(fallback_random=True):
        assert_same_gradients(model, eager)
    model.eval(), eager.eval()
    assert_same(model, eager, 1, 7, 10)
    assert_same(model, eager, 1, 9, 6)


def test_state_dict_copies_and_pickles_do_not_show_it(quick_compiler):
    model, eager = pair()
    assert_same(model, eager, 1, 3, 4)
    assert list(model.state_dict()) == list(create_model(**SMALL).state_dict())
    assert [k for k, _ in model.named_modules()] == [k for k, _ in eager.named_modules()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.compiled
        with torch.no_grad():
            twin.conv_proj.bias.add_(1)  # the copy computes with its own weights
        eager.load_state_dict(twin.state_dict())
        assert_same(twin, eager, 1, 3, 4)

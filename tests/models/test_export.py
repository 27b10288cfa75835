"""Graphs of the backbone, traced at one size and run at others."""

import pytest
import torch
from helpers import move_off_initial_values, relative_difference
from torch import nn
from torch.export import Dim

from rope_vit_det import create_model


class _Neck(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.net = create_model("rope_vit_reg4_demo16", features_only=True, **kwargs)

    def forward(self, x):
        return self.net.detection_features(x)["neck"]


def neck(**kwargs):
    return move_off_initial_values(_Neck(**kwargs))


def assert_runs_at(graph, model, sizes):
    for height, width in sizes:
        x = torch.randn(2, 3, height * 16, width * 16)
        with torch.inference_mode():
            assert relative_difference(graph(x), model(x)) < 1e-5, (height, width)


GLOBAL = dict(pt_grid_size=(16, 16))
WINDOWED = dict(window_size=4, global_blocks=[1, 3])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("kwargs", "traced", "sizes"),
    [
        (GLOBAL, (10, 14), [(10, 14), (14, 10), (16, 16), (3, 33), (24, 6)]),
        (GLOBAL | dict(tile_pos_embed=True), (20, 24), [(20, 24), (18, 40), (33, 17)]),
        (WINDOWED, (8, 12), [(8, 12), (12, 8), (16, 16), (8, 36)]),
        (WINDOWED | dict(tile_pos_embed=True), (8, 12), [(8, 12), (12, 8), (16, 20)]),
    ],
)
def test_traced_graphs_serve_other_sizes(kwargs, traced, sizes):
    model = neck(**kwargs)
    x = torch.randn(2, 3, traced[0] * 16, traced[1] * 16)
    model(x)  # tables that are remembered from before must not get into the graph
    graph = torch.jit.trace(model, x, check_trace=False)
    assert_runs_at(graph, model, sizes)


@pytest.mark.parametrize(
    ("kwargs", "step", "sizes"),
    [
        (GLOBAL, 1, [(10, 14), (14, 10), (16, 16), (3, 33), (24, 6)]),
        (WINDOWED, 4, [(8, 12), (12, 8), (16, 16), (8, 36)]),
    ],
)
def test_exported_graphs_serve_other_sizes(kwargs, step, sizes):
    model = neck(**kwargs)
    x = torch.randn(2, 3, sizes[0][0] * 16, sizes[0][1] * 16)
    model(x)
    dims = {
        0: Dim("batch", min=2, max=64),
        2: 16 * step * Dim("rows", min=2, max=128),
        3: 16 * step * Dim("columns", min=2, max=128),
    }
    graph = torch.export.export(model, (x,), dynamic_shapes=(dims,)).module()
    assert_runs_at(graph, model, sizes)

"""The table in docs/networks.md: current, and right by a count of our own."""

import re
from pathlib import Path

import pytest
import torch
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)

from rope_vit_det.models.complexity import count_multiply_adds
from rope_vit_det.weights import published_weights
from rope_vit_det.weights.table import networks_table

DOC = Path(__file__).parents[2] / "docs" / "networks.md"
ROW = re.compile(r"^\| `(\S+)` +\| +(\d+) \| +([\d.]+) \| +(\d+) \| +(\d+) \|", re.M)


@pytest.mark.slow
def test_the_table_is_current():
    table = networks_table()
    assert table in DOC.read_text("utf-8"), "run tools/networks_table.py"
    assert [row[0] for row in ROW.findall(table)] == list(published_weights())


def multiply_adds_by_hand(network, *, window):
    """1024 x 1024 px at stride 16, from birder's configuration of the network."""
    with torch.device("meta"):
        config = registry.net_factory(network, 0).config
    n = 64 * 64
    s = config.get("num_reg_tokens", 0) + config.get("class_token", True)
    d, m, depth = config["hidden_dim"], config["mlp_dim"], config["num_layers"]
    stem = n * 3 * 16 * 16 * d
    linear = 4 * d * d + (3 if "SwiGLU" in config.get("mlp_layer_type", "") else 2) * d * m
    everywhere = 2 * d * (n + s) ** 2
    in_windows = 2 * d * (n * (window * window + s) + s * (n + s)) if window else everywhere
    return stem + depth * (n + s) * linear + 4 * everywhere + (depth - 4) * in_windows


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("network", sorted({e.network for e in published_weights().values()}))
def test_multiply_adds_equal_a_count_by_hand(network, window):
    counted = count_multiply_adds(network, 1024, 1024, patch_stride=16, window_size=window)
    by_hand = multiply_adds_by_hand(network, window=window)
    assert counted == by_hand
    rows = [row for row in ROW.findall(DOC.read_text("utf-8")) if row[0].startswith(network + "_")]
    assert rows
    for row in rows:
        assert int(row[4 if window else 3]) == round(by_hand / 1e9)


@pytest.mark.parametrize("name", published_weights())
def test_parameters_and_size_are_those_of_birder(name):
    entry = published_weights()[name]
    with torch.device("meta"):
        net = registry.net_factory(entry.network, 0, size=entry.image_size)
    net.strip_for_detection_features()
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    (row,) = [row for row in ROW.findall(DOC.read_text("utf-8")) if row[0] == name]
    size = registry.get_pretrained_metadata(name)["resolution"]
    assert (int(row[1]), int(row[1])) == tuple(size)
    assert row[2] == f"{millions:.1f}"

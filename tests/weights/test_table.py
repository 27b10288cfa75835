"""The tables in docs/networks.md: current, and right by a count of our own."""

import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)
from helpers import birders_weights

from rope_vit_det.models import VARIANTS
from rope_vit_det.models.complexity import network_complexity, total
from rope_vit_det.weights import published_weights

DOC = Path(__file__).parents[2] / "docs" / "networks.md"
TIMMS = {n: entry for n, entry in published_weights().items() if n not in birders_weights()}
ROW = re.compile(r"^\| `(\S+)` +\| +(\d+) \| +([\d.]+) \| +(\d+) \| +(\d+) \|", re.M)


@pytest.mark.slow
def test_the_tables_are_current():
    script = runpy.run_path(str(DOC.with_name("networks_table.py")))
    tables = script["birders_table"](), script["timms_table"]()
    assert all(table in DOC.read_text("utf-8") for table in tables), "run docs/networks_table.py"
    names = [row[0] for table in tables for row in ROW.findall(table)]
    assert names == list(published_weights())


def test_every_weights_have_a_row():
    rows = [row[0] for row in ROW.findall(DOC.read_text("utf-8"))]
    assert rows == list(published_weights())


def multiply_adds_by_hand(network, *, window):
    """1024 x 1024 px at stride 16, from birder's configuration of the network."""
    with torch.device("meta"):
        config = registry.net_factory(network, 0).config
    s = config.get("num_reg_tokens", 0) + config.get("class_token", True)
    products = 3 if "SwiGLU" in config.get("mlp_layer_type", "") else 2
    d, m, depth = config["hidden_dim"], config["mlp_dim"], config["num_layers"]
    return by_formula(d, m, depth, s, products, window=window)


def by_formula(d, m, depth, s, products, *, window):
    n = 64 * 64
    stem = n * 3 * 16 * 16 * d
    linear = 4 * d * d + products * d * m
    everywhere = 2 * d * (n + s) ** 2
    in_windows = 2 * d * (n * (window * window + s) + s * (n + s)) if window else everywhere
    return stem + depth * (n + s) * linear + 4 * everywhere + (depth - 4) * in_windows


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("network", sorted({e.network for e in birders_weights().values()}))
def test_multiply_adds_equal_a_count_by_hand(network, window):
    parts = network_complexity(network, 1024, 1024, patch_stride=16, window_size=window)
    counted = total(parts).multiply_adds
    by_hand = multiply_adds_by_hand(network, window=window)
    assert counted == by_hand
    rows = [row for row in ROW.findall(DOC.read_text("utf-8")) if row[0].startswith(network + "_")]
    assert rows
    for row in rows:
        assert int(row[4 if window else 3]) == round(by_hand / 1e9)


@pytest.mark.parametrize("name", birders_weights())
def test_parameters_and_size_are_those_of_birder(name):
    entry = birders_weights()[name]
    with torch.device("meta"):
        net = registry.net_factory(entry.network, 0, size=entry.image_size)
    net.strip_for_detection_features()
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    (row,) = [row for row in ROW.findall(DOC.read_text("utf-8")) if row[0] == name]
    size = registry.get_pretrained_metadata(name)["resolution"]
    assert (int(row[1]), int(row[1])) == tuple(size)
    assert row[2] == f"{millions:.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMMS)
def test_the_row_of_timms_weights_is_counted_from_its_network(name):
    entry = TIMMS[name]
    with torch.device("meta"):
        net = timm.create_model(entry.network, num_classes=0)
    head = [each for each in (net.norm, net.fc_norm, net.attn_pool) if each is not None]
    gone = sum(p.numel() for module in head for p in module.parameters())
    millions = (sum(p.numel() for p in net.parameters()) - gone) / 1e6
    mlp = net.blocks[0].mlp
    products = 2 if isinstance(mlp, timm.layers.Mlp) else 3
    shape = (net.embed_dim, mlp.fc2.in_features, len(net.blocks), net.num_prefix_tokens, products)
    (row,) = [row for row in ROW.findall(DOC.read_text("utf-8")) if row[0] == name]
    assert int(row[1]) == entry.image_size[0] and row[2] == f"{millions:.1f}"
    for window, column in ((0, 3), (16, 4)):
        assert int(row[column]) == round(by_formula(*shape, window=window) / 1e9)
    assert VARIANTS[entry.network]["num_layers"] == len(net.blocks)

"""The networks against birder's own: the oracle of the published weights."""

import pytest
import torch
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)
from helpers import move_off_initial_values, relative_difference

from rope_vit_det import create_model
from rope_vit_det.models import VARIANTS

NAMES = [
    f"rope_vit_{size}{patch}"
    for size in ("t", "s", "m", "b", "l", "reg1_t", "reg1_s", "reg4_m", "reg4_b", "reg4_l")
    for patch in (14, 16)
]


def birder_model(name, *, num_classes=0, size=(224, 224), config=None):
    model = registry.net_factory(name, num_classes, size=size, config=config)
    model.set_dynamic_size()
    return model


@pytest.fixture(scope="module")
def pair():
    """birder's network and ours, with birder's weights."""
    torch.manual_seed(0)
    oracle = move_off_initial_values(birder_model("rope_vit_reg4_b14", num_classes=19167))
    ours = create_model("rope_vit_reg4_b14", num_classes=19167).eval()
    ours.load_state_dict(oracle.state_dict(), strict=True, assign=True)  # one copy in memory
    return ours, oracle


def test_card_network_has_the_parameters_of_its_card(pair):
    assert sum(p.numel() for p in pair[0].parameters()) == 100_452_063


@pytest.mark.parametrize(
    ("size", "pt_grid_size", "batch"),
    [
        ((224, 224), None, 1),
        ((224, 224), (16, 16), 2),
        pytest.param((336, 252), None, 1, marks=pytest.mark.slow),
        ((336, 252), (16, 16), 1),
        pytest.param((336, 336), None, 1, marks=pytest.mark.slow),
        pytest.param((336, 336), (16, 16), 3, marks=pytest.mark.slow),
        pytest.param((518, 350), None, 1, marks=pytest.mark.slow),
        pytest.param((518, 350), (16, 16), 3, marks=pytest.mark.slow),
    ],
)
def test_card_network_equals_birder(pair, size, pt_grid_size, batch):
    ours, oracle = pair
    ours.pt_grid_size = pt_grid_size
    oracle.rope.pt_grid_size = pt_grid_size
    oracle.rope.grid_size = None  # else birder answers from a table of its own size
    x = torch.randn(batch, 3, *size)
    with torch.inference_mode():
        features = ours.detection_features(x)
        assert list(features) == ["neck"]
        oracle_neck = oracle.detection_features(x)["stage1"]
        assert relative_difference(features["neck"], oracle_neck) < 1e-5
        embedding = oracle.embedding(x)
        assert relative_difference(ours.embedding(x), embedding) < 1e-5
        assert relative_difference(ours(x), oracle.classify(embedding)) < 1e-5
    if size == (224, 224):
        assert features["neck"].shape == (batch, 768, 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_birders_keys_and_shapes(name):
    with torch.device("meta"):
        ours = create_model(name, num_classes=10)
        oracle = birder_model(name, num_classes=10)
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in oracle.state_dict().items()}
    rates = [block.drop_path.p for block in oracle.encoder.block]
    assert [block.drop_path.p for block in ours.encoder.block] == pytest.approx(rates)


def test_names_are_those_of_the_issue():
    assert set(NAMES) <= set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("rope_vit_t14", (224, 224)),
        ("rope_vit_t14", (336, 448)),
        ("rope_vit_reg1_s16", (336, 448)),
        pytest.param("rope_vit_reg1_s16", (224, 224), marks=pytest.mark.slow),
        pytest.param("rope_vit_m16", (224, 224), marks=pytest.mark.slow),
        pytest.param("rope_vit_m16", (336, 448), marks=pytest.mark.slow),
    ],
)
def test_small_names_equal_birder_and_go_both_ways(name, image_size):
    ours = move_off_initial_values(create_model(name, num_classes=7, image_size=image_size))
    oracle = birder_model(name, num_classes=7, size=image_size).eval()
    oracle.load_state_dict(ours.state_dict(), strict=True)
    p = ours.patch_size
    for size in ((p * 16, p * 16), (p * 9, p * 21)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            oracle_neck = oracle.detection_features(x)["stage1"]
            assert relative_difference(ours.detection_features(x)["neck"], oracle_neck) < 1e-5
            assert relative_difference(ours(x), oracle(x)) < 1e-5


def test_gradients_equal_birders():
    oracle = move_off_initial_values(birder_model("rope_vit_reg1_t14", num_classes=5))
    ours = create_model("rope_vit_reg1_t14", num_classes=5)
    ours.load_state_dict(oracle.state_dict())
    x, weight = torch.randn(2, 3, 224, 308), torch.randn(2, 192, 16, 22)
    for model, key in ((ours, "neck"), (oracle, "stage1")):
        (model.detection_features(x)[key] * weight).sum().backward()
    oracle_grads = {k: p.grad for k, p in oracle.named_parameters() if p.grad is not None}
    assert {k for k, p in ours.named_parameters() if p.grad is not None} == set(oracle_grads)
    for key, parameter in ours.named_parameters():
        if key in oracle_grads:
            assert relative_difference(parameter.grad, oracle_grads[key]) < 1e-4, key

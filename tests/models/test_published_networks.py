"""The sixteen architectures of the published weights against birder's, every parameter moved."""

import pytest
import torch
from birder.model_registry import registry
from birder.net import rope_vit  # noqa: F401  (registers the networks)
from helpers import move_off_initial_values, relative_difference

from rope_vit_det import create_model
from rope_vit_det.models import VARIANTS

# Each with the size its weights were trained at.
PUBLISHED = {
    "rope_deit3_m14": 252,
    "rope_deit3_reg4_m14": 252,
    "rope_deit3_reg4_t16": 256,
    "rope_i_vit_b16_pn_aps_c1": 224,
    "rope_i_vit_l14_nf_swiglu_c1": 336,
    "rope_i_vit_l14_pn_aps_c1": 336,
    "rope_i_vit_reg1_b16_pn_npn_avg_c1": 512,
    "rope_i_vit_reg1_s16_pn_npn_avg_c1": 512,
    "rope_i_vit_reg1_t16_pn_npn_avg_c1": 512,
    "rope_i_vit_s16_pn_aps_c1": 384,
    "rope_vit_m14_swiglu_avg": 224,
    "rope_vit_reg4_b14": 336,
    "rope_vit_reg8_b14_nps_avg": 224,
    "rope_vit_reg8_so150m_p14_swiglu_rms_ap": 252,
    "rope_vit_reg8_so150m_p14_swiglu_rms_avg": 224,
    "rope_vit_s14_swiglu_avg": 224,
}
NUM_CLASSES = 11
_LARGE = ("rope_i_vit_l14_pn_aps_c1", "rope_i_vit_reg1_b16_pn_npn_avg_c1")


def _pair(name, *, num_layers=None):
    """birder's network and ours, with birder's weights; of the first blocks, if so wanted."""
    size = PUBLISHED[name]
    depth = {} if num_layers is None else {"num_layers": num_layers}
    oracle = registry.net_factory(name, NUM_CLASSES, size=(size, size), config=depth or None)
    oracle.set_dynamic_size()
    move_off_initial_values(oracle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, name, VARIANTS[name] | depth)
        ours = create_model(name, num_classes=NUM_CLASSES, image_size=size)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours.eval(), oracle


def _assert_equal(ours, oracle, height, width, *, pt_grid_size=None, classes=True):
    if pt_grid_size is not None:
        ours.pt_grid_size = oracle.rope.pt_grid_size = pt_grid_size
        oracle.rope.grid_size = None  # else birder answers from a table of its own size
    x = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        neck = oracle.detection_features(x)["stage1"]
        assert relative_difference(ours.detection_features(x)["neck"], neck) < 1e-5
        if not classes:
            return
        embedding = oracle.embedding(x)
        assert relative_difference(ours.embedding(x), embedding) < 1e-5
        assert relative_difference(ours(x), oracle.classify(embedding)) < 1e-5


@pytest.mark.parametrize("name", [*PUBLISHED, "rope_deit3_m16", "rope_deit3_reg4_m16"])
def test_keys_shapes_and_drop_path_are_birders(name):
    size = PUBLISHED.get(name, 224)
    with torch.device("meta"):
        ours = create_model(name, num_classes=NUM_CLASSES, image_size=size)
        oracle = registry.net_factory(name, NUM_CLASSES, size=(size, size))
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in oracle.state_dict().items()}
    rates = [block.drop_path.p for block in oracle.encoder.block]
    assert [block.drop_path.p for block in ours.encoder.block] == pytest.approx(rates)


@pytest.mark.parametrize(
    "name",
    [
        # The slow ones have the parts of a smaller one.
        pytest.param(name, marks=pytest.mark.slow) if name in _LARGE else name
        for name in PUBLISHED
    ],
)
def test_first_blocks_equal_birder(name):
    """Two of the blocks, which are all alike; everything else is whole."""
    ours, oracle = _pair(name, num_layers=2)
    patch, size = ours.patch_size, PUBLISHED[name]
    _assert_equal(ours, oracle, size, size)
    _assert_equal(ours, oracle, 9 * patch, 21 * patch, classes=False)
    _assert_equal(ours, oracle, 21 * patch, 9 * patch, pt_grid_size=(16, 16), classes=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_network_equals_birder(name):
    ours, oracle = _pair(name)
    patch, size = ours.patch_size, PUBLISHED[name]
    for height, width in ((size, size), (16 * patch, 16 * patch), (17 * patch, 38 * patch)):
        _assert_equal(ours, oracle, height, width)
    for pt_grid_size in ((16, 16), (20, 12)):
        _assert_equal(ours, oracle, size, size, pt_grid_size=pt_grid_size)
        _assert_equal(ours, oracle, 17 * patch, 38 * patch, pt_grid_size=pt_grid_size)

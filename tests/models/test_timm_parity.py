"""The networks against timm's own: the oracle of DINOv3, EVA-02 and the rest."""

import pytest
import timm
import torch
from helpers import move_off_initial_values, relative_difference

from rope_vit_det import create_model
from rope_vit_det.models import VARIANTS
from rope_vit_det.models.variants import default_image_size, is_birders
from rope_vit_det.weights.timm import from_timm, to_timm

NAMES = [name for name in VARIANTS if not is_birders(name)]
SMALL = [
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
    "vit_small_patch16_lingbot",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_medium_patch16_rope_reg1_gap_256",
]
# Two blocks of each that a test can do without the others of; the rest of a network is whole.
SHALLOW = [
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_pe_lang_large_patch14_448",
    "vit_giant_patch16_lingbot",
]


def pair(name, depth=None):
    """timm's network with random weights, and ours with the same."""
    torch.manual_seed(0)
    changed = ({}, {}) if depth is None else ({"depth": depth}, {"num_layers": depth})
    oracle = timm.create_model(name, dynamic_img_size=True, **changed[0])
    oracle = move_off_initial_values(oracle).eval()
    ours = create_model(name, num_classes=oracle.num_classes, **changed[1]).eval()
    state, left_out = from_timm(oracle.state_dict(), name)
    ours.load_state_dict(state)
    assert not left_out
    return ours, oracle


def compare(ours, oracle, size, batch):
    x = torch.randn(batch, 3, *size)
    with torch.inference_mode():
        features, (neck,) = oracle.forward_intermediates(x, indices=1)
        assert relative_difference(ours.detection_features(x)["neck"], neck) < 1e-5
        tokens = ours._encode(x)[0]
        if not ours.norm_pooled:
            tokens = ours.norm(tokens)
        special, registers = ours.num_special_tokens, ours.num_reg_tokens
        theirs = torch.cat(  # [CLS, REG, PATCH] there
            (
                features[:, special - registers : special],
                features[:, : special - registers],
                features[:, special:],
            ),
            dim=1,
        )
        assert relative_difference(tokens, theirs) < 1e-5
        embedding = ours.embedding(x)
        theirs = oracle.forward_head(features, pre_logits=True)
        assert relative_difference(embedding, theirs) < 1e-5
        if oracle.num_classes:
            logits = ours.classifier(embedding)
            assert relative_difference(logits, oracle.forward_head(features)) < 1e-5


def check(name, depth, sizes):
    ours, oracle = pair(name, depth)
    patch = ours.patch_size
    for (rows, columns), batch in sizes:
        compare(ours, oracle, (rows * patch, columns * patch), batch)
    back, theirs = to_timm(ours.state_dict(), name), oracle.state_dict()
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_equal_timm(name):
    grid = min(default_image_size(name) // VARIANTS[name]["patch_size"], 24)
    check(name, 2, [((grid, grid), 1), ((grid + 3, grid // 2), 3)])


@pytest.mark.parametrize("name", SHALLOW)
def test_a_block_of_the_other_sizes_equals_timm(name):
    check(name, 1, [((5, 9), 1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_equals_timm(name):
    grid = default_image_size(name) // VARIANTS[name]["patch_size"]
    whole = VARIANTS[name]["hidden_dim"] <= 1024
    sizes = [((grid, grid), 1), ((grid + 4, grid + 4), 1), ((grid + 3, grid // 4), 3)]
    check(name, None if whole else 2, sizes)


def test_every_rotary_network_of_timm_is_here():
    timms = set(timm.list_models(module="eva"))
    without = {name for name in timms if name.startswith(("eva_", "eva02_enormous"))}
    assert timms - without - {n for n in timms if "sapiens2" in n} == set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SMALL)) for n in NAMES]
)
def test_the_parameters_are_as_many_as_timms(name):
    with torch.device("meta"):
        oracle = timm.create_model(name)
        ours = create_model(name, num_classes=oracle.num_classes)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, oracle)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eva02_enormous_patch14_clip_224", "no rotary positions"),
        ("vit_base_patch16_sapiens2", "Sapiens2"),
        ("vit_base_patch16_dinov4", "did you mean 'vit_base_patch16_dinov3'"),
    ],
)
def test_what_is_left_out_is_refused_by_name(name, reason):
    with pytest.raises(ValueError, match=reason):
        create_model(name)


@pytest.mark.parametrize("name", SMALL)
def test_a_window_of_the_whole_grid_is_global_attention(name):
    torch.manual_seed(0)
    grid = default_image_size(name) // VARIANTS[name]["patch_size"]
    networks = [
        create_model(name, num_layers=2, window_size=window, global_blocks=blocks).eval()
        for window, blocks in ((0, None), (grid, []))
    ]
    networks[1].load_state_dict(move_off_initial_values(networks[0]).state_dict())
    x = torch.randn(1, 3, *[side * networks[0].patch_size for side in (grid, grid - 3)])
    with torch.inference_mode():
        one, other = (network.detection_features(x)["neck"] for network in networks)
    assert relative_difference(one, other) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_a_window_sees_what_was_pretrained(name):
    """An image of windows' size each: the first one's tokens are those of that image alone."""
    torch.manual_seed(0)
    net = create_model(name, num_layers=1, window_size=4, global_blocks=[]).eval()
    move_off_initial_values(net)
    if net.pos_embedding is not None:  # a table is stretched over the image, or tiled
        net.tile_pos_embed = True
    patch = net.patch_size
    x = torch.randn(1, 3, 4 * patch, 8 * patch)
    with torch.inference_mode():
        wide = net.detection_features(x)["neck"]
        for i in (0, 1):
            alone = net.detection_features(x[..., i * 4 * patch : (i + 1) * 4 * patch])["neck"]
            assert relative_difference(wide[..., i * 4 : i * 4 + 4], alone) < 1e-5


def test_positions_that_are_not_mapped_go_on_beyond_the_grid_of_pretraining():
    """DINOv3's cells then keep their distance, with the centre of the image at 0."""
    name = "vit_tiny_patch16_dinov3_qkvb"
    net = create_model(name)
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32}
    own = net.rope((16, 16), pt_grid_size=(16, 16), **arguments)
    larger = net.rope((20, 20), **arguments)
    inner = larger.unflatten(1, (20, 20))[:, 2:-2, 2:-2].flatten(1, 2)
    assert torch.allclose(own, inner, atol=1e-5)


def test_networks_without_a_position_table_refuse_to_tile_it():
    with pytest.raises(ValueError, match="tile_pos_embed must be False"):
        create_model("vit_small_patch16_dinov3", tile_pos_embed=True)


def test_learned_frequencies_belong_to_their_block_and_get_gradients():
    net = create_model("vit_small_patch16_rope_mixed_224", num_layers=3)
    net.freeze(1)
    net.detection_features(torch.randn(1, 3, 64, 96))["neck"].square().sum().backward()
    gradients = [block.attn.frequencies.grad for block in net.encoder.block]
    assert gradients[0] is None
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1:])

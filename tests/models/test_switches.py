"""Every switch on every family of networks, at a size that a test can do."""

import copy

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from helpers import detector_input, move_off_initial_values, relative_difference
from timm.layers import resample_patch_embed
from torch import nn

from rope_vit_det import create_model
from rope_vit_det.backbone import RoPEViTNeck, create_backbone
from rope_vit_det.models import VARIANTS, rope_vit
from rope_vit_det.solver.optimizers import parameter_groups

# One of each kind of network that differs in more than its sizes; and what else is like them.
KINDS = [
    "vit_base_patch16_dinov3",
    "eva02_small_patch14_224",
    "eva02_base_patch14_224",
    "vit_pe_core_base_patch16_224",
    "vit_pe_spatial_base_patch16_512",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_mixed_ape_224",
    "vit_base_patch16_rope_reg1_gap_256",
]
OTHERS = [
    "rope_vit_reg4_b14",
    "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_base_patch16_lingbot",
    "eva02_base_patch16_clip_224",
    "vit_pe_lang_large_patch14_448",
    "vit_base_patch16_rope_ape_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_betwixt_patch16_rope_reg4_gap_256",
]
FAMILIES = KINDS + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
TINY = dict(hidden_dim=64, num_layers=3, num_heads=2, mlp_dim=96)
each_family = pytest.mark.parametrize("name", FAMILIES)


def twin(net, **kwargs):
    """The network with its weights, built with other switches."""
    other = create_model(net.variant, **TINY | kwargs).eval()
    other.load_state_dict(net.state_dict())
    return other


def neck(net, x):
    return net.detection_features(x)["neck"]


def same(net, other, x, tolerance=1e-5):
    with torch.no_grad():
        return relative_difference(neck(net, x), neck(other, x)) < tolerance


def images(net, rows, columns, batch=1):
    return torch.randn(batch, 3, rows * net.patch_stride, columns * net.patch_stride)


@pytest.fixture(params=FAMILIES)
def net(request):
    net = move_off_initial_values(create_model(request.param, **TINY))
    net.variant = request.param
    with torch.no_grad():  # attention looks somewhere, and what it finds counts
        for block in net.encoder.block:
            block.attn.qkv.weight.mul_(6)
            for scale in (block.layer_scale_1, block.layer_scale_2):
                for gamma in scale.parameters():
                    gamma.add_(0.5)
    return net


def test_a_window_as_large_as_the_grid_is_global_attention(net):
    x = images(net, 5, 9)
    for window in (9, 20):
        assert same(twin(net, window_size=window, global_blocks=[]), net, x)
    assert not same(twin(net, window_size=4, global_blocks=[]), net, x)


def test_one_network_serves_all_sizes(net):
    windowed = twin(net, window_size=4, global_blocks=[1])
    for rows, columns in [(5, 9), (9, 5), (1, 13)]:
        x = images(net, rows, columns)
        assert same(windowed, copy.deepcopy(windowed), x, 1e-6)
        y = neck(windowed, x.repeat(3, 1, 1, 1))
        assert y.shape == (3, 64, rows, columns)
        assert relative_difference(y[2:], neck(windowed, x)) < 1e-5


def test_another_stride_is_a_kernel_of_that_size(net):
    patch, grid = net.patch_size, net.pos_grid
    for stride in (8, 16 if patch == 14 else 14):
        moved = twin(net, patch_stride=stride)
        size = [side * stride for side in grid]
        resampled = create_model(net.variant, **TINY, patch_size=stride, image_size=size).eval()
        kernel = resample_patch_embed(net.conv_proj.weight, [stride, stride])
        resampled.load_state_dict(net.state_dict() | {"conv_proj.weight": kernel})
        x = torch.randn(1, 3, 4 * stride, 7 * stride)
        assert same(moved, resampled, x)


def test_the_architectures_own_positions_are_mapped_or_counted(net):
    default = VARIANTS[net.variant].get("default_pt_grid_size")
    own = "count" if default is None else default
    other = (16, 16) if default is None else "count"
    x = images(net, 20, 11)
    assert same(twin(net, pt_grid_size=own), net, x, 1e-7)
    assert not same(twin(net, pt_grid_size=other), net, x, 1e-4)
    grid = default or (16, 16)
    x = images(net, *grid)  # of pretraining: there is one set of positions
    assert same(twin(net, pt_grid_size=own), twin(net, pt_grid_size=other), x)


def test_rescaled_positions_are_those_of_a_larger_grid(net, monkeypatch):
    monkeypatch.setattr(rope_vit, "random_scale", lambda most, device: torch.tensor([1.5]))
    x = images(net, 4, 6)
    scaled = twin(net, rescale_coords=2.0, pt_grid_size=(4, 6), drop_path_rate=0.0).train()
    assert same(scaled, twin(net, pt_grid_size=(6, 9)), x)


def test_a_position_table_is_tiled_where_there_is_one(net):
    x = images(net, 8, 4)
    if net.pos_embedding is None:
        with pytest.raises(ValueError, match="tile_pos_embed must be False for a network without"):
            twin(net, tile_pos_embed=True)
        return
    tiled = twin(net, window_size=4, global_blocks=[], tile_pos_embed=True)
    alone = x[..., : 4 * net.patch_stride, :]
    with torch.no_grad():
        assert (
            net.num_special_tokens
            or relative_difference(neck(tiled, x)[..., :4, :], neck(tiled, alone)) < 1e-5
        )
    assert not same(tiled, twin(net, window_size=4, global_blocks=[]), x, 1e-4)


def test_drop_path_grows_with_depth_and_acts_in_training_alone(net):
    dropping = twin(net, drop_path_rate=0.8)
    assert [block.drop_path.p for block in dropping.encoder.block] == [0, 0.4, 0.8]
    x = images(net, 3, 4, batch=8)
    assert same(dropping, net, x, 1e-7)
    assert not same(dropping.train(), net, x, 1e-4)


def gradients(net, x):
    net.zero_grad()
    torch.manual_seed(1)
    neck(net, x).square().mean().backward()
    return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients(net):
    switches = dict(window_size=4, global_blocks=[1], drop_path_rate=0.3)
    x = images(net, 5, 6, batch=2)
    plain = gradients(twin(net, **switches).train(), x)
    saving = gradients(twin(net, **switches, activation_checkpoint=True).train(), x)
    assert plain.keys() == saving.keys()
    assert all(relative_difference(saving[key], grad) < 1e-5 for key, grad in plain.items())
    # All of the network but what follows the blocks, and what the mean alone would use.
    idle = {key.partition(".")[0] for key, _ in net.named_parameters() if key not in plain}
    assert idle <= {"norm", "attn_pool", "classifier"}


def test_frozen_blocks_have_no_gradients_and_no_drop_path(net):
    frozen = twin(net, drop_path_rate=0.5)
    frozen.freeze(2)
    learning = {key.partition(".attn")[0] for key in gradients(frozen.train(), images(net, 3, 4))}
    assert all(key.startswith("encoder.block.2") for key in learning) and learning
    assert [block.drop_path.p > 0 for block in frozen.encoder.block] == [False, False, True]


@each_family
def test_every_parameter_learns_at_the_rate_of_its_layer(name):
    net = create_backbone(name, **TINY)
    model = nn.Module()
    model.backbone = RoPEViTNeck(net)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    for key, parameter in net.named_parameters():
        layer = int(key.split(".")[2]) + 1 if key.startswith("encoder.block.") else 0
        group = of[id(parameter)]
        assert group["lr"] == 0.5 ** (4 - layer), key
        decays = key.endswith(".weight") and parameter.dim() > 1
        assert (group["weight_decay"] > 0) == decays, key
    assert len(of) == len(list(net.parameters()))


def test_precisions_stay_close_to_float32(net):
    windowed = twin(net, window_size=4, global_blocks=[1])
    x = images(net, 5, 9)
    with torch.inference_mode():
        expected = neck(windowed, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = neck(windowed, x)
        half = neck(windowed.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert relative_difference(found.float(), expected) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("net", ["vit_base_patch16_rope_mixed_ape_224"], indirect=True)
def test_compiled_blocks_give_the_eager_result(net, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="aot_eager"))
    torch._dynamo.reset()
    switches = dict(window_size=4, global_blocks=[1], drop_path_rate=0.3)
    eager, compiled = twin(net, **switches), twin(net, **switches, compile=True)
    for rows, columns in [(5, 9), (9, 7)]:
        assert same(compiled, eager, images(net, rows, columns, batch=2))
    x = images(net, 5, 6, batch=2)
    one, other = gradients(eager.train(), x), gradients(compiled.train(), x)
    assert one.keys() == other.keys()
    assert all(relative_difference(other[key], grad) < 1e-4 for key, grad in one.items())


@pytest.mark.slow
def test_an_exported_graph_serves_other_sizes(net):
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = twin(net, window_size=4, global_blocks=[1])

        def forward(self, x):
            return neck(self.net, x)

    model, step = Neck().eval(), 4 * net.patch_stride
    dims = {i: step * torch.export.Dim(side, min=2, max=64) for i, side in ((2, "h"), (3, "w"))}
    x = images(net, 8, 12, batch=2)
    graph = torch.export.export(model, (x,), dynamic_shapes=({0: None, **dims},)).module()
    for rows, columns in [(8, 12), (16, 8), (12, 12)]:
        x = images(net, rows, columns, batch=2)
        with torch.no_grad():
            assert relative_difference(graph(x), model(x)) < 1e-5


@pytest.mark.slow
@each_family
def test_a_detector_is_augmented_over_scales(name, detector_cfg, monkeypatch):
    """Each view is what a detector finds that has seen no other."""
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name] | TINY)
    cfg = detector_cfg
    cfg.MODEL.ROPE_VIT.NAME, cfg.MODEL.ROPE_VIT.WINDOW_SIZE = name, 4
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 30, 10
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0.0, 3
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (96, 180), 300
    model = move_off_initial_values(build_model(cfg))
    image = detector_input(120, 170)
    with torch.no_grad():
        first = GeneralizedRCNNWithTTA(cfg, copy.deepcopy(model))([image])[0]["instances"]
        model([detector_input(40, 200)])
        again = GeneralizedRCNNWithTTA(cfg, model)([image])[0]["instances"]
    assert len(first) == cfg.TEST.DETECTIONS_PER_IMAGE
    torch.testing.assert_close(again.scores, first.scores)
    torch.testing.assert_close(again.pred_boxes.tensor, first.pred_boxes.tensor)

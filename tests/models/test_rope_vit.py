"""Behaviour of the network that no oracle network has."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import move_off_initial_values, relative_difference
from torch._subclasses.fake_tensor import FakeTensorMode

from rope_vit_det import RoPEViTBackbone, create_model
from rope_vit_det.layers import cpu as cpu_kernels


def test_sizes_that_are_no_multiple_of_the_stride_are_refused():
    model = create_model("rope_vit_t14")
    for height, width in ((224, 225), (13, 28), (28, 0)):
        with pytest.raises(ValueError, match=f"{height}x{width} px.*patch stride.*14"):
            model.detection_features(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(name="rope_vit_x14"), "rope_vit_x14.*did you mean.*allowed: .*rope_vit_reg4_b14"),
        (dict(name=["rope_vit_t14"]), r"unknown network \['rope_vit_t14'\]"),
        (dict(image_size=225), "image_size.*multiples of the patch size 14"),
        *[
            (dict(image_size=size), "image_size must be a side in pixels or .h, w.*got")
            for size in (0, -14, (14, 28, 42), "224", (224,), 224.0, (0, 224), True, [[224, 224]])
        ],
        *[
            (dict(patch_stride=stride), "patch_stride must be None .the patch size 14., or.*got")
            for stride in (True, 0, -16, 16.0, "16", (16, 16))
        ],
        *[
            (dict(drop_path_rate=rate), "drop_path_rate must be 0 or more, below 1, got")
            for rate in (-0.1, 1.0, 1, float("nan"), "0.1", False)
        ],
        *[
            (dict(num_classes=classes), "num_classes must be a whole number of 0 or more.*got")
            for classes in (None, -1, 2.0, True, "10")
        ],
        *[
            (dict(global_blocks=blocks), r"global_blocks must be .*0\.\.11, got")
            for blocks in (3, "3", [3.0], [True], [-1], ["3"])
        ],
        *[
            (dict(rescale_coords=factor), "rescale_coords must be None .off.*got")
            for factor in (0.5, float("nan"), True, "2")
        ],
        *[
            (dict([(key, value)]), f"{key} must be .*got '{value}'")
            for key, value in (
                ("rope_rotation", "half"),
                ("rope_indexing", "yx"),
                ("rope_angles", "twice"),
                ("qkv_bias", "none"),
                ("mlp_layer", "Mlp"),
                ("norm_layer", "layernorm"),
                ("pooling", "avg"),
            )
        ],
        (dict(name="rope_vit_s14_swiglu_avg", pooling="class_token"), "pooling must be .*'mean'"),
        (dict(pt_grid_size=16), "pt_grid_size.*got 16"),
        (dict(pt_grid_size=(True, 16)), "pt_grid_size.*True"),
        (dict(pt_grid_size=(16.0, 16)), "pt_grid_size.*16.0"),
        (dict(window_size=False), "window_size.*False"),
        (dict(window_size=4.0), "window_size.*4.0"),
        (dict(pt_grid_size=(16, 16, 16)), "pt_grid_size.*16, 16, 16"),
        (dict(pt_grid_size="sixteen"), "pt_grid_size.*count.*sixteen"),
        (dict(window_size=-1), "window_size.*-1"),
        (dict(global_blocks=[12]), r"global_blocks.*0\.\.11"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "rope_vit_t14", **kwargs})


def test_a_network_for_features_only_refuses_its_other_two_uses():
    net = create_model("rope_vit_t14", cls=RoPEViTBackbone)
    plain = create_model("rope_vit_t14", features_only=True)
    x = torch.zeros(1, 3, 28, 28)
    for use in (net.embedding, plain.embedding, plain):
        with pytest.raises(RuntimeError, match=r"call detection_features\(\)"):
            use(x)
    with pytest.raises(ValueError, match="num_classes must be 0 with features_only, got 3"):
        create_model("rope_vit_t14", features_only=True, num_classes=3)
    assert net(x)["neck"].shape == plain.detection_features(x)["neck"].shape == (1, 192, 2, 2)


def test_pt_grid_size_can_be_assigned_without_reloading():
    model = move_off_initial_values(create_model("rope_vit_t14"))
    mapped = create_model("rope_vit_t14", pt_grid_size=(16, 16)).eval()
    mapped.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 28 * 14, 20 * 14)
    with torch.inference_mode():
        counting = model.detection_features(x)["neck"]
        by_map = mapped.detection_features(x)["neck"]
        model.pt_grid_size = (16, 16)
        assert torch.equal(model.detection_features(x)["neck"], by_map)
        model.pt_grid_size = "count"
        assert torch.equal(model.detection_features(x)["neck"], counting)
        assert relative_difference(by_map, counting) > 1e-4


def test_tables_of_inference_serve_a_later_training_step():
    model = create_model("rope_vit_t14", window_size=4)
    x = torch.randn(1, 3, 8 * 14, 6 * 14)
    with torch.inference_mode():
        model.detection_features(x)
    model.detection_features(x)["neck"].sum().backward()
    assert model.encoder.block[0].attn.qkv.weight.grad.isfinite().all()


def test_tables_are_bounded_and_stay_out_of_copies_and_state_dicts():
    model = create_model("rope_vit_t14").eval()
    with torch.inference_mode():
        for cells in range(1, model.rope.max_cached_tables + 5):
            model.detection_features(torch.zeros(1, 3, 14, 14 * cells))
    assert len(model.rope._tables) == model.rope.max_cached_tables
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin.rope._tables) == 0
    assert not [key for key in model.state_dict() if "rope" in key]


def test_large_tables_are_bounded_by_their_size():
    rope = create_model("rope_vit_t14").rope

    def table(width):
        return rope((512, width), device=torch.device("cpu"), dtype=torch.float32)

    for width in range(60, 68):
        newest = table(width)  # 15 MiB and more
    size = sum(kept.nbytes for kept in rope._tables.values())
    assert size <= rope.max_cached_bytes < size + newest.nbytes
    assert table(67) is newest
    assert table(300).nbytes > rope.max_cached_bytes
    assert len(rope._tables) == 1


def test_autocast_and_bf16_stay_close_to_float32():
    model = move_off_initial_values(create_model("rope_vit_reg1_t14", window_size=4))
    x = torch.randn(1, 3, 10 * 14, 14 * 14)
    with torch.inference_mode():
        expected = model.detection_features(x)["neck"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            neck = model.detection_features(x)["neck"]
        assert relative_difference(neck.float(), expected) < 1e-2
        neck = model.bfloat16().detection_features(x.bfloat16())["neck"]
        assert relative_difference(neck.float(), expected) < 3e-2


def test_autocast_is_not_followed_where_bf16_is_slow(monkeypatch):
    model = create_model("rope_vit_reg1_t14", window_size=4).eval()
    x = torch.randn(1, 3, 10 * 14, 14 * 14)
    exact = model.detection_features(x)["neck"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.detection_features(x)["neck"]
        monkeypatch.setattr(cpu_kernels, "_SLOW_BF16", True)
        for images in (x, x.bfloat16()):
            found = model.detection_features(images)["neck"]
            assert found.dtype == rounded.dtype
            assert relative_difference(found, rounded) > 1e-4
        assert torch.equal(model.detection_features(x)["neck"], exact)
        assert torch.is_autocast_enabled("cpu")
        cast = model.bfloat16().detection_features(x)["neck"]
    assert relative_difference(cast.float(), exact) < 3e-2


def test_activation_checkpointing_gives_the_same_gradients():
    plain = create_model("rope_vit_t14", drop_path_rate=0.2)
    saving = create_model("rope_vit_t14", drop_path_rate=0.2, activation_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 70, 84)
    for model in (plain, saving):
        torch.manual_seed(1)
        model.train().detection_features(x)["neck"].square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_freeze_stops_stem_tokens_positions_and_first_blocks():
    model = create_model("rope_vit_reg1_t14", drop_path_rate=0.3)
    model.freeze(2)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    names = ("conv_proj", "class_token", "reg_tokens", "pos_embedding", "encoder.block.0.")
    expected = {
        key for key, _ in model.named_parameters() if key.startswith((*names, "encoder.block.1."))
    }
    assert frozen == expected
    rates = [block.drop_path.p for block in model.encoder.block]
    assert rates[:2] == [0, 0] and all(rates[2:])

    model.freeze(-1)
    assert not any(p.requires_grad for p in model.parameters())
    for wrong in (13, -2, True, 1.0):
        with pytest.raises(
            ValueError, match=r"freeze_blocks must be 0 .nothing is frozen., 1 to 12"
        ):
            model.freeze(wrong)


@pytest.mark.parametrize("recompute", [False, True])
def test_cudnns_plans_are_for_training_at_one_size(monkeypatch, recompute):
    """Its attention builds one for every shape; recomputed blocks have the kernels they had."""
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(*args):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(cpu_kernels, "_ENABLED", False)
    monkeypatch.setattr(cpu_kernels, "_ENABLED_IN_INFERENCE", False)
    model = create_model("rope_vit_reg4_demo16", activation_checkpoint=recompute).train()

    def look(side):
        seen.clear()
        y = model.detection_features(torch.randn(1, 3, side, 64))["neck"]
        if model.training:
            y.sum().backward()
            assert len(seen) == (8 if recompute else 4)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        return set(seen)

    assert [look(side) for side in (64, 64, 96, 64)] == [{True}, {True}, {False}, {False}]
    model.eval()
    with torch.inference_mode():
        assert look(64) == {False}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"window_size": 16}, {"tile_pos_embed": True}])
def test_on_a_gpu_all_stays_there_and_the_host_never_waits(monkeypatch, kwargs, training):
    """Fake tensors have the rules of a GPU, and no values that a host could wait for."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        pytest.skip("this torch, such as 2.8, draws no random numbers on a GPU that is not there")
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it waits
    with FakeTensorMode(), torch.device("cuda"):
        model = create_model("rope_vit_reg4_m14", patch_stride=16, num_classes=3, **kwargs)
        model.train(training)
        for height, width in ((224, 224), (512, 800)):
            images = torch.empty(2, 3, height, width)
            neck, logits = model.detection_features(images)["neck"], model(images)
            assert neck.shape == (2, 512, height // 16, width // 16) and logits.shape == (2, 3)
            assert neck.is_cuda and logits.is_cuda

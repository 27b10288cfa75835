"""LoRA against the products written out, in networks and detectors."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from helpers import move_off_initial_values, relative_difference
from torch import nn

from rope_vit_det import create_model
from rope_vit_det.backbone import create_backbone
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError
from rope_vit_det.layers.attention import QueryValueBias
from rope_vit_det.layers.lora import AdaptedLinear, add_adapter, merge_adapters
from rope_vit_det.solver.optimizers import parameter_groups
from rope_vit_det.weights.detector import read_detector

NAMES = ["rope_vit_reg4_demo16", "vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"]


def adapted(name, rank=4):
    """A network, and the same with adapters that have learned something."""
    torch.manual_seed(0)
    plain = move_off_initial_values(create_model(name, num_layers=2)).eval()
    other = copy.deepcopy(plain)
    other.adapt(rank, 8.0, 0.0)
    return plain, other


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), QueryValueBias(6)])
def test_an_adapter_adds_the_product_of_its_matrices(layer):
    x = torch.randn(5, 6)
    before = layer(x)
    add_adapter(layer, rank=2, alpha=6.0, dropout=0.0)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.lora_b.normal_()
    product = 3 * (x @ layer.lora_a.T @ layer.lora_b.T)
    assert relative_difference(layer(x), before + product) < 1e-6


def test_dropout_is_of_the_adapters_alone():
    layer = nn.Linear(64, 64)
    x = torch.randn(5, 64)
    before = layer(x)
    add_adapter(layer, rank=2, alpha=6.0, dropout=0.5)
    assert torch.equal(layer.train()(x), before)
    with torch.no_grad():
        layer.lora_b.normal_()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_nothing_changes_and_then_only_adapters_learn(name):
    plain, other = adapted(name)
    x = torch.randn(1, 3, 6 * plain.patch_size, 9 * plain.patch_size)
    with torch.inference_mode():
        neck = plain.detection_features(x)["neck"]
        assert relative_difference(other.detection_features(x)["neck"], neck) < 1e-6
    other.detection_features(x)["neck"].square().sum().backward()
    learning = {n for n, p in other.named_parameters() if p.requires_grad}
    layers = [m for m in other.encoder.modules() if isinstance(m, AdaptedLinear)]
    assert len(layers) == len([m for m in plain.encoder.modules() if isinstance(m, nn.Linear)])
    assert len(learning) == 2 * len(layers) and all(".lora_" in n for n in learning)
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in layers)
    own = {k: v for k, v in other.state_dict().items() if ".lora_" not in k}
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_merged_they_are_the_plain_network_with_other_weights(name):
    plain, other = adapted(name)
    move_off_initial_values(other)
    x = torch.randn(1, 3, 6 * plain.patch_size, 9 * plain.patch_size)
    with torch.inference_mode():
        learned = other.detection_features(x)["neck"]
        assert relative_difference(plain.detection_features(x)["neck"], learned) > 1e-3
        merge_adapters(other)
        plain.load_state_dict(other.state_dict())
        assert relative_difference(plain.detection_features(x)["neck"], learned) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_without_a_rank_nothing_changes(name):
    torch.manual_seed(0)
    plain = create_model(name, num_layers=2, features_only=True)
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    net = create_backbone(name, num_layers=2, patch_stride=plain.patch_size, lora_dropout=0.5)
    assert torch.equal(torch.get_rng_state(), random_state)
    state, wanted = net.state_dict(), plain.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert [type(m) for m in net.encoder.modules()] == [type(m) for m in plain.encoder.modules()]
    assert all(p.requires_grad for p in net.parameters())


@pytest.fixture
def lora_cfg(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg4_demo16"
    detector_cfg.MODEL.ROPE_VIT.LORA.RANK = 4
    return detector_cfg


def test_a_detector_takes_base_weights_and_goes_on_from_its_own_checkpoint(lora_cfg, tmp_path):
    lora_cfg.MODEL.ROPE_VIT.LORA.RANK = 0
    base = build_model(lora_cfg)
    DetectorCheckpointer(base, str(tmp_path)).save("base")
    lora_cfg.MODEL.ROPE_VIT.LORA.RANK = 4
    model = build_model(lora_cfg)
    DetectorCheckpointer(model).load(str(tmp_path / "base.pth"))
    own = base.backbone.net.state_dict()
    assert all(torch.equal(model.backbone.net.state_dict()[key], own[key]) for key in own)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                layer.lora_b.normal_(std=0.02)
    DetectorCheckpointer(model, str(tmp_path)).save("adapted")
    again = build_model(lora_cfg)
    DetectorCheckpointer(again, whole=True).load(str(tmp_path / "adapted.pth"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())

    merge_adapters(again)
    (tmp_path / "config.yaml").write_text(lora_cfg.dump())
    state, _, _ = read_detector(tmp_path / "adapted.pth")
    merged = again.backbone.net.state_dict()
    assert all(torch.equal(state[key], merged[key]) for key in merged)

    for rank, message in (
        (0, r"set MODEL\.ROPE_VIT\.LORA\.RANK 4"),
        (8, r"set MODEL\.ROPE_VIT\.LORA\.RANK to"),
    ):
        lora_cfg.MODEL.ROPE_VIT.LORA.RANK = rank
        with pytest.raises(InputError, match=message):
            DetectorCheckpointer(build_model(lora_cfg)).load(str(tmp_path / "adapted.pth"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_another_alpha_names_the_one_to_set(lora_cfg, tmp_path, dtype):
    lora_cfg.MODEL.ROPE_VIT.LORA.ALPHA = 10.0
    model = build_model(lora_cfg)
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "ten.pth")
    DetectorCheckpointer(build_model(lora_cfg)).load(str(tmp_path / "ten.pth"))
    lora_cfg.MODEL.ROPE_VIT.LORA.ALPHA = 64.0
    other = build_model(lora_cfg)
    with pytest.raises(InputError, match=r"ten\.pth.*RANK 4 MODEL.ROPE_VIT.LORA.ALPHA 10$"):
        DetectorCheckpointer(other).load(str(tmp_path / "ten.pth"))
    # In any script, Detectron2's checkpointer or none.
    with pytest.raises(InputError, match=r"set MODEL.*RANK 4 MODEL.ROPE_VIT.LORA.ALPHA 10$"):
        other.load_state_dict(state)


def test_adapters_learn_at_the_rate_of_their_block(lora_cfg):
    model = build_model(lora_cfg)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    blocks = model.backbone.net.encoder.block
    for i, block in enumerate(blocks):
        layers = [layer for layer in block.modules() if isinstance(layer, AdaptedLinear)]
        wanted = 0.5 ** (len(blocks) - i)
        assert {rates[id(layer.lora_a)] for layer in layers} == {wanted}
        assert not any(id(layer.weight) in rates for layer in layers)


@pytest.mark.parametrize(
    ("key", "value"), [("RANK", -1), ("ALPHA", 0), ("DROPOUT", 1.0), ("RANK", 2.5)]
)
def test_wrong_values_name_their_key(lora_cfg, key, value):
    lora_cfg.MODEL.ROPE_VIT.LORA[key] = value
    with pytest.raises(InputError, match=rf"MODEL\.ROPE_VIT\.LORA\.{key} is {value}"):
        build_model(lora_cfg)


@pytest.mark.parametrize("blocks", [-1, 4])
def test_a_network_with_all_blocks_frozen_takes_no_adapters(lora_cfg, blocks):
    lora_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = blocks
    message = rf"FREEZE_BLOCKS is {blocks}; allowed: 0 to 3 beside LoRA"
    with pytest.raises(InputError, match=message):
        build_model(lora_cfg)


def test_adapters_learn_beside_frozen_blocks():
    net = create_backbone("rope_vit_reg4_demo16", lora_rank=4, freeze_blocks=3)
    learning = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert learning and all("encoder.block.3." in name for name in learning)

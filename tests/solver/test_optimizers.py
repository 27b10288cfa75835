"""The optimizer's groups against ViTDet's own layer decay in Detectron2."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from rope_vit_det.solver.optimizers import build_optimizer


def _vitdet_name(name: str) -> str:
    """The name that the parameter has, or would have, in Detectron2's ViT."""
    name = re.sub(r"encoder\.block\.(\d+)", r"blocks.\1", name)
    name = re.sub(r"net\.conv_proj", "net.patch_embed.proj", name)
    return re.sub(r"net\..*(pos_embedding|class_token|reg_tokens)$", "net.pos_embed", name)


@pytest.fixture
def built(detector_cfg):
    detector_cfg.SOLVER.BASE_LR = 0.5
    detector_cfg.SOLVER.WEIGHT_DECAY = 0.25
    detector_cfg.SOLVER.LAYER_DECAY = 0.7
    detector_cfg.MODEL.FPN.NORM = "LN"
    model = build_model(detector_cfg)
    optimizer = build_optimizer(detector_cfg, model)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return model, optimizer, group_of


def test_learning_rates_are_vitdets(built):
    model, optimizer, group_of = built
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = set()
    for name, parameter in model.named_parameters():
        oracle = get_vit_lr_decay_rate(_vitdet_name(name), lr_decay_rate=0.7, num_layers=12)
        assert group_of[id(parameter)]["lr"] == pytest.approx(0.5 * oracle), name
        rates.add(round(oracle, 9))
    assert len(rates) == 14  # stem, twelve blocks, heads


def test_weight_decay_spares_norms_biases_tokens_and_positions(built):
    model, _, group_of = built
    spared = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = "norm" in type(module).__name__.lower()
            is_token = name in ("class_token", "reg_tokens", "pos_embedding")
            no_decay = is_norm or is_token or name == "bias"
            decay = group_of[id(parameter)]["weight_decay"]
            assert decay == (0.0 if no_decay else 0.25), f"{module_name}.{name}"
            if no_decay:
                spared.add(name)
    assert spared == {"weight", "bias", "class_token", "reg_tokens", "pos_embedding"}


def test_every_trainable_parameter_is_there_once_and_no_frozen_one(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = 3
    model = build_model(detector_cfg)
    optimizer = build_optimizer(detector_cfg, model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert any(not p.requires_grad for p in model.parameters())


def test_a_resnet_backbone_can_be_trained_too(detector_cfg):
    detector_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    detector_cfg.SOLVER.LAYER_DECAY = 0.7
    optimizer = build_optimizer(detector_cfg, build_model(detector_cfg))
    assert {group["lr"] for group in optimizer.param_groups} == {detector_cfg.SOLVER.BASE_LR}

"""What a network costs, against counts by hand and by fvcore."""

import math

import pytest
import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn

from rope_vit_det import create_model
from rope_vit_det.errors import InputError
from rope_vit_det.models.complexity import network_complexity, network_tables

B14 = "rope_vit_reg4_b14"
DIM, MLP, DEPTH, SPECIAL = 768, 3072, 12, 5


@pytest.mark.parametrize(
    ("side", "stride", "window"), [(224, 14, 0), (1024, 16, 0), (1024, 16, 16), (1024, 16, 24)]
)
def test_multiply_adds_of_b14_equal_a_count_by_hand(side, stride, window):
    patches = (side // stride) ** 2
    tokens = patches + SPECIAL
    scores_global = tokens * tokens
    scores = scores_global
    if window:
        whole, rest = divmod(side // stride, window)
        edges = [window] * whole + [rest] * (rest > 0)
        in_windows = [h * w * (h * w + SPECIAL) for h in edges for w in edges]
        scores = sum(in_windows) + SPECIAL * tokens
    parts = network_complexity(B14, side, side, patch_stride=stride, window_size=window)
    assert parts["stem"].multiply_adds == patches * 3 * stride * stride * DIM
    assert parts["feed-forward layers"].multiply_adds == DEPTH * tokens * 2 * DIM * MLP
    assert parts["attention"].multiply_adds == (
        DEPTH * tokens * 4 * DIM * DIM + 2 * DIM * (4 * scores_global + 8 * scores)
    )
    assert sum(part.multiply_adds for part in parts.values()) == sum(
        parts[name].multiply_adds for name in ("stem", "attention", "feed-forward layers")
    )


def test_parameters_are_all_there_and_those_of_the_trained_kernel():
    parts = network_complexity(B14, 64, 96, patch_stride=16)
    model = create_model(B14, features_only=True)
    assert sum(part.parameters for part in parts.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert parts["stem"].parameters == 3 * 14 * 14 * DIM + DIM


def attention(inputs, outputs):
    q, k, v = (each.type().sizes() for each in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


class _Neck(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.detection_features(x)["neck"]


@pytest.mark.parametrize("window", [0, 4])
def test_fvcore_counts_the_same(window):
    kwargs = dict(window_size=window, global_blocks=[1])
    net = _Neck(create_model("rope_vit_reg4_demo16", features_only=True, **kwargs)).eval()
    image = torch.zeros(1, 3, 96, 128)
    flops = FlopCountAnalysis(net, image).set_op_handle(
        **{"aten::scaled_dot_product_attention": attention, "aten::layer_norm": None}
    )
    parts = network_complexity("rope_vit_reg4_demo16", 96, 128, **kwargs)
    counted = flops.unsupported_ops_warnings(False).by_module()
    blocks = [f"net.encoder.block.{i}" for i in range(4)]
    assert parts["stem"].multiply_adds == counted["net.conv_proj"]
    assert parts["attention"].multiply_adds == sum(counted[f"{b}.attn"] for b in blocks)
    assert parts["feed-forward layers"].multiply_adds == sum(counted[f"{b}.mlp"] for b in blocks)
    activations = ActivationCountAnalysis(net, image).unsupported_ops_warnings(False)
    assert sum(part.activations for part in parts.values()) == activations.total()


def test_windows_cost_less_and_the_table_says_what_was_counted():
    text = network_tables("rope_vit_reg1_t16", (512, 512), 16, [0, 4])
    first, second = (text.split("| total")[i].split("|")[2] for i in (1, 2))
    assert float(second) < float(first)
    assert "global attention" in text and "windows of 4x4 tokens" in text


def test_a_network_that_does_not_exist():
    with pytest.raises(InputError, match="rope_vit_reg4_b14"):
        network_tables("resnet", (64, 64), 16, [0])

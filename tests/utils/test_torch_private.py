"""What torch does not document is still there, and does what this package uses it for."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from rope_vit_det.utils import torch_private


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_onednn_linear_is_a_linear_layer():
    assert torch_private.has_onednn_linear(), "torch.ops.mkldnn._linear_pointwise is gone"
    layer, x = nn.Linear(48, 32), torch.randn(2, 70, 48)
    found = torch_private.onednn_linear(x, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, layer(x).detach())


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *args: None),
        lambda m: m.register_forward_pre_hook(lambda *args: None),
        lambda m: m.register_full_backward_hook(lambda *args: None),
        lambda m: m.register_full_backward_pre_hook(lambda *args: None),
        lambda m: torch_module.register_module_forward_hook(lambda *args: None),
        lambda m: torch_module.register_module_forward_pre_hook(lambda *args: None),
        lambda m: torch_module.register_module_full_backward_hook(lambda *args: None),
    ],
)
def test_every_kind_of_hook_is_seen_until_it_is_removed(register):
    layers = [nn.Linear(2, 2), nn.GELU()]
    assert not torch_private.are_watched(layers)
    handle = register(layers[1])
    try:
        assert torch_private.are_watched(layers)
    finally:
        handle.remove()
    assert not torch_private.are_watched(layers)

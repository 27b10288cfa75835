"""Kernel resampling against timm's, and the property it is made for."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference
from timm.layers import resample_patch_embed

from rope_vit_det.layers.patch_embed import PatchEmbed, pseudo_inverse_resize, resample_kernel


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (14, 8), (16, 32), (8, 9)])
def test_equals_timm(old, new):
    weight = torch.randn(6, 3, old, old)
    expected = resample_patch_embed(weight, [new, new])
    ours = resample_kernel(weight, pseudo_inverse_resize(old, new))
    assert relative_difference(ours, expected) < 1e-5


def test_upsampled_patches_give_the_old_tokens():
    """FlexiViT, section 3.4: the pseudo-inverse undoes the resize of the patches exactly."""
    native, strided = PatchEmbed(3, 8, 14, 14), PatchEmbed(3, 8, 14, 16)
    strided.load_state_dict(native.state_dict(), strict=True)
    patch = torch.randn(5, 3, 14, 14)
    upsampled = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    assert relative_difference(strided(upsampled), native(patch)) < 1e-5


def test_parameter_gradient_and_checkpoint_keep_the_trained_size():
    embed = PatchEmbed(3, 8, 14, 16)
    embed(torch.randn(1, 3, 32, 48)).sum().backward()
    assert embed.weight.shape == embed.weight.grad.shape == (8, 3, 14, 14)
    assert set(embed.state_dict()) == {"weight", "bias"}


def test_nothing_is_resampled_at_the_native_stride():
    embed = PatchEmbed(3, 8, 14, 14)
    x = torch.randn(1, 3, 28, 42)
    assert torch.equal(embed(x), F.conv2d(x, embed.weight, embed.bias, stride=14))

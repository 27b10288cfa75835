"""The CPU kernels against naive float64 attention and plain linear layers, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference

from rope_vit_det.layers import cpu_kernels
from rope_vit_det.layers.attention import attend

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (None, 2e-2)}


def naive(q, k, v):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


# One, several and a broken number of chunks of queries; few and many keys.
@pytest.mark.parametrize(("queries", "keys"), [(5, 1200), (1100, 1100), (1029, 1400), (37, 50)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_attention_equals_the_naive_one(queries, keys, dtype):
    tensors = [torch.randn(2, n, 2, 64, dtype=dtype) for n in (queries, keys, keys)]
    exact = [t.double().requires_grad_() for t in tensors]
    ours = [t.requires_grad_() for t in tensors]
    weight = torch.randn(2, queries, 2, 64, dtype=dtype)
    expected = naive(*exact)
    found = attend(*ours)
    assert found.dtype == dtype
    forward, backward = TOLERANCE[dtype]
    if forward is None:  # what rounding every product to bf16 costs differs between versions
        forward = 1.25 * relative_difference(naive(*ours).double(), expected)
    assert relative_difference(found.double(), expected) < forward
    (expected * weight.double()).sum().backward()
    (found * weight).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert relative_difference(a.grad.double(), b.grad) < backward
    with torch.inference_mode():
        assert relative_difference(attend(*ours).double(), expected) < forward


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_equals_torchs(rows, bias):
    layer = cpu_kernels.Linear(96, 160, bias=bias)
    x = torch.randn(2, rows, 96, requires_grad=True)
    weight = torch.randn(2, rows, 160)
    parameters = [x, *layer.parameters()]
    expected = F.linear(x, layer.weight, layer.bias)
    found = layer(x)
    assert relative_difference(found, expected) < 1e-5
    grads = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), parameters), grads, strict=True):
        assert relative_difference(a, b) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16

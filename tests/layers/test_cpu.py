"""The CPU kernels against naive float64 attention and plain linear layers, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference

from rope_vit_det.layers import cpu as cpu_kernels
from rope_vit_det.layers.attention import RotaryAttention, attend
from rope_vit_det.layers.mlp import FeedForward, SwiGLU

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (None, 2e-2)}


@pytest.fixture(
    autouse=True,
    params=[(True, True), (False, True), (False, False)],
    ids=["our kernels", "in inference", "PyTorch's"],
)
def kernels(request, monkeypatch):
    """All, whichever this machine's CPU would get."""
    enabled, in_inference = request.param
    monkeypatch.setattr(cpu_kernels, "_ENABLED", enabled)
    monkeypatch.setattr(cpu_kernels, "_ENABLED_IN_INFERENCE", in_inference)


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
    with torch.inference_mode():
        assert relative_difference(layer(x), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


LAYERS = {
    "feed-forward": lambda: FeedForward(32, 80),
    "SwiGLU": lambda: SwiGLU(32, 80),
    "attention": lambda: RotaryAttention(32, 4, num_special_tokens=1),
    "attention, interleaved": lambda: RotaryAttention(
        32, 4, num_special_tokens=1, rotation="interleaved"
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1, 2500), (3, 1024), (1, 1201), (1300, 2)])
def test_parts_of_the_tokens_give_what_all_give_at_once(name, shape):
    layer, x = LAYERS[name](), torch.randn(*shape, 32)
    others = [torch.randn(2, shape[1], 8)] if isinstance(layer, RotaryAttention) else []
    expected = layer(x, *others)  # for a backward pass, and so at once
    parts = []
    first = next(layer.children())
    first.register_forward_hook(lambda module, inputs, out: parts.append(inputs[0].shape[1]))
    with torch.no_grad():
        found = layer(x, *others)
    assert len(parts) > 1 and sum(parts) == shape[1]
    assert max(parts) - min(parts) < len(parts)
    assert relative_difference(found, expected) < 1e-6


XEON, EPYC = (
    "vendor_id : GenuineIntel\nflags : fpu avx512f",
    "vendor_id : AuthenticAMD\nflags : fpu",
)


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        (f"{XEON} avx512_bf16 amx_bf16 amx_tile\n", False),
        (f"{XEON} avx512_bf16\n", True),
        (f"{EPYC} avx512f avx512_bf16\n", False),
        (f"{EPYC} avx2\n", True),
        ("Features : fp asimd bf16\n", False),  # ARM
        ("", False),
    ],
)
def test_cpus_whose_bf16_products_are_slow(cpuinfo, slow):
    assert cpu_kernels._has_slow_bf16(cpuinfo) is slow

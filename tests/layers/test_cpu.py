"""The CPU kernels against naive float64 attention and plain linear layers, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference
from torch.utils._python_dispatch import TorchDispatchMode

from rope_vit_det.layers import cpu as cpu_kernels
from rope_vit_det.layers.cpu import attend
from rope_vit_det.layers.windows import WindowGroup
from rope_vit_det.models.encoder import EncoderBlock

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
    layer = torch.nn.Linear(96, 160, bias=bias)
    x = torch.randn(2, rows, 96, requires_grad=True)
    weight = torch.randn(2, rows, 160)
    parameters = [x, *layer.parameters()]
    expected = F.linear(x, layer.weight, layer.bias)
    found = cpu_kernels.linear(layer, x)
    assert relative_difference(found, expected) < 1e-5
    grads = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), parameters), grads, strict=True):
        assert relative_difference(a, b) < 1e-5
    with torch.inference_mode():
        assert relative_difference(cpu_kernels.linear(layer, x), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_kernels.linear(layer, x).dtype == torch.bfloat16


BLOCKS = {
    "plain": {},
    "SwiGLU": {"mlp_layer": "NormSwiGLU", "attn_norm": True, "rotation": "interleaved"},
    "RMSNorm": {"norm": torch.nn.RMSNorm, "layer_scale_init_value": 0.5},
}
PARTS = ["", "norm1", "attn", "attn.qkv", "attn.proj", "layer_scale_1", "norm2", "mlp", "drop_path"]


def make_block(name="plain"):
    arguments = {
        "num_special_tokens": 1,
        "norm": torch.nn.LayerNorm,
        "mlp_layer": "FeedForward",
        "attn_norm": False,
        "layer_scale_init_value": None,
        "drop_path": 0.0,
        "rotation": "halves",
    }
    return EncoderBlock(32, 4, 80, **arguments | BLOCKS[name]).eval()


def tokens(windowed=True, tokens=2500, batch=1):
    windows = [WindowGroup(0, tokens - 1, 1)] if windowed else None
    return torch.randn(batch, tokens, 32), torch.randn(2, tokens, 8), windows


def watch(module):
    """Shapes that hooks before and after its calls see; a hook ends the way by parts."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    module.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    return seen


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, 2500), (3, 1024), (1, 300), (1300, 2)])
def test_a_block_gives_what_its_plain_forward_gives(name, windowed, batch, length):
    block, args = make_block(name), tokens(windowed, length, batch)
    with torch.no_grad():
        assert cpu_kernels.takes(block, args[0])
        found = block(*args)
        watch(block)
        assert not cpu_kernels.takes(block, args[0])
        assert relative_difference(found, block(*args)) < 1e-5


@pytest.mark.parametrize("windowed", [True, False])
def test_an_empty_batch_stays_empty(windowed):
    x, rope, windows = tokens(windowed, 100, batch=0)
    with torch.no_grad():
        assert make_block()(x, rope, windows).shape == (0, 100, 32)


def test_transforms_of_torch_func_give_the_gradients_of_autograd():
    block, (x, rope, _) = make_block(), tokens(windowed=False, tokens=100, batch=2)
    parameters = dict(block.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(block, parameters, (image[None], rope)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    wanted = torch.autograd.grad(
        sum(loss(parameters, image) for image in x), [*parameters.values()]
    )
    for found, gradient in zip(each.values(), wanted, strict=True):
        assert relative_difference(found.sum(0), gradient) < 1e-5


@pytest.mark.parametrize("part", [*PARTS, "mlp.0", "mlp.1", "mlp.3"])
@pytest.mark.parametrize("windowed", [True, False])
def test_hooks_fire_once_with_all_tokens(part, windowed):
    block, args = make_block(), tokens(windowed)
    with torch.no_grad():
        expected = block(*args)
        seen = watch(block.get_submodule(part))
        found = block(*args)
    assert relative_difference(found, expected) < 1e-5
    if part == "drop_path":  # ends both branches
        seen = seen[:2] if seen[:2] == seen[2:] else []
    assert len(seen) == 2 and all(shape[:2] == (1, 2500) for shape in seen)


def test_global_hooks_see_every_part_once():
    block, args, seen = make_block(), tokens(), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: seen.append(module)
    )
    try:
        with torch.no_grad():
            block(*args)
    finally:
        handle.remove()
    once = [module for module in block.modules() if module is not block.drop_path]
    assert sorted(map(id, once)) == sorted(id(m) for m in seen if m is not block.drop_path)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.0", "mlp.3"])
def test_a_part_that_was_replaced_is_called(part):
    block, args = make_block(), tokens()
    old = block.get_submodule(part)
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    block.set_submodule(part, new)
    with torch.no_grad():
        found = block(*args)
        old.weight *= 2
        old.bias *= 2
        block.set_submodule(part, old)
        assert relative_difference(found, block(*args)) < 1e-5


class _Casts(TorchDispatchMode):
    """Counts the casts of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].dim() == 2
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_autocast_casts_each_weight_once_for_all_parts(monkeypatch, name, windowed, learns):
    monkeypatch.setattr(cpu_kernels, "_PART_TOKENS", 40)
    block, args = make_block(name).requires_grad_(learns), tokens(windowed, 100)
    autocast = torch.autocast("cpu", torch.bfloat16)

    def run():
        with autocast:
            return block(*args)

    with torch.no_grad(), _Casts() as casts:
        found = run()
    with torch.inference_mode():
        others = [run()]
    matrices = [each for each in block.modules() if isinstance(each, torch.nn.Linear)]
    assert casts.count == len(matrices)
    monkeypatch.setattr(cpu_kernels, "_with_weights_cast_once", lambda: cpu_kernels.linear)
    with torch.no_grad():
        others.append(run())
    assert all(torch.equal(found, other) for other in others)


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

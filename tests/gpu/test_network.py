"""The network on a GPU: against birder's there, a naive reference, and itself."""

import contextlib

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from helpers import REHEARSED, move_off_initial_values, relative_difference
from reference import neck
from torch._dynamo.utils import counters

SIZES = [(56, 84)] if REHEARSED else [(224, 224), (336, 252), (518, 350), (896, 896), (350, 1022)]


@pytest.fixture
def birders(build):
    """birder's network and ours with its weights; see `build`."""
    registry = pytest.importorskip("birder.model_registry").registry
    pytest.importorskip("birder.net.rope_vit")  # registers its networks

    def pair(**kwargs):
        ours = build(num_classes=5, **kwargs).eval()
        name = "rope_vit_reg1_t14" if REHEARSED else "rope_vit_reg4_b14"
        oracle = registry.net_factory(name, 5, size=(224, 224))
        oracle.set_dynamic_size()
        move_off_initial_values(oracle)
        ours.load_state_dict(oracle.state_dict())
        return ours, oracle.to(next(ours.parameters()).device)

    return pair


def _neck(net, x):
    return next(iter(net.detection_features(x).values()))


@pytest.mark.parametrize("pt_grid_size", [None, (16, 16)])
def test_equals_birder_at_any_size(birders, device, exact, pt_grid_size):
    ours, oracle = birders()
    ours.pt_grid_size = oracle.rope.pt_grid_size = pt_grid_size
    for batch, size in enumerate(SIZES, start=1):
        oracle.rope.grid_size = None  # else birder answers from a table of its own size
        x = torch.randn(min(batch, 3), 3, *size, device=device)
        with torch.inference_mode():
            assert relative_difference(_neck(ours, x), _neck(oracle, x)) < 2e-5, size
            assert relative_difference(ours(x), oracle(x)) < 2e-5, size
            assert relative_difference(ours.embedding(x), oracle.embedding(x)) < 2e-5, size


def test_gradients_equal_birders(birders, device, exact):
    ours, oracle = birders()
    x = torch.randn(2, 3, *SIZES[-1], device=device)
    weight = torch.randn_like(_neck(ours, x))
    for net in (ours, oracle):
        (_neck(net, x) * weight).sum().backward()
    expected = {k: p.grad for k, p in oracle.named_parameters() if p.grad is not None}
    found = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert relative_difference(grad, expected[key]) < 3e-4, key


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("window", [0, 4 if REHEARSED else 16])
def test_half_precision_is_as_near_to_float32_as_birders(
    birders, device, exact, dtype, bound, window
):
    """The mean difference from float32, of the mean value; ours at most 1.5 times birder's."""
    ours, oracle = birders()
    x = torch.randn(2, 3, *SIZES[-1], device=device)
    differences = []
    for net, own_window in ((ours, window), (oracle, None)):
        if own_window:
            net = birders(window_size=own_window)[0]
        with torch.inference_mode():
            expected = _neck(net, x)
            with torch.autocast(device.type, dtype):
                found = _neck(net, x).float()
        differences.append(((found - expected).abs().mean() / expected.abs().mean()).item())
    assert differences[0] < bound and differences[0] < 1.5 * differences[1] + 1e-4, differences


@pytest.mark.parametrize("grid", [(10, 14)] if REHEARSED else [(10, 14), (33, 20), (3, 40)])
@pytest.mark.parametrize("window", [4, 16])
def test_windows_equal_the_masked_reference(build, device, exact, grid, window):
    """Values and gradients, of a plain forward pass in float64 on the CPU."""
    net = move_off_initial_values(build("rope_vit_reg1_t14", window_size=window))
    x = torch.randn(2, 3, grid[0] * 14, grid[1] * 14, device=device)
    state = {k: v.detach().cpu().double().requires_grad_() for k, v in net.state_dict().items()}
    arguments = dict(patch=14, heads=3, pos_grid=net.pos_grid, window=window)
    expected = neck(state, x.cpu().double(), global_blocks=net.global_blocks, **arguments)
    found = _neck(net, x)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight.cpu()).sum().backward()
    assert relative_difference(found.cpu(), expected) < 2e-5
    for key, parameter in net.named_parameters():
        if state[key].grad is not None:
            assert relative_difference(parameter.grad.cpu(), state[key].grad) < 1e-4, key
    with torch.inference_mode():
        assert relative_difference(_neck(net, x).cpu(), expected) < 2e-5


@pytest.mark.parametrize("window", [0, 4])
def test_checkpointing_gives_the_same_gradients_in_less_memory(build, device, exact, window):
    size = (128, 192) if REHEARSED else (1024, 768)
    x = torch.randn(2, 3, *size, device=device)
    gradients, peaks = [], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        arguments = dict(window_size=window, global_blocks=[3], drop_path_rate=0.2)
        arguments |= dict(activation_checkpoint=checkpoint)
        net = build("rope_vit_reg4_demo16", **arguments).train()
        if device.type == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(1)
        _neck(net, x).square().mean().backward()
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() - held)
        gradients.append({k: p.grad for k, p in net.named_parameters() if p.grad is not None})
        del net
    assert gradients[0].keys() == gradients[1].keys()
    for key, grad in gradients[0].items():
        assert relative_difference(gradients[1][key], grad) < 1e-4, key
    assert not peaks or peaks[1] < 0.7 * peaks[0]


@contextlib.contextmanager
def _no_synchronisation(device):
    """Whatever makes the host wait for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"window_size": 4}, {"window_size": 4, "compile": True}])
def test_the_host_never_waits_in_the_network(build, device, options):
    if options.get("compile") and REHEARSED:
        pytest.skip("there is nothing to wait for on the CPU")
    arguments = dict(drop_path_rate=0.2, rescale_coords=2.0) if not options.get("compile") else {}
    net = build("rope_vit_reg4_demo16", global_blocks=[3], **options, **arguments)
    x = torch.randn(2, 3, 160, 224, device=device)
    for train in (True, False):
        net.train(train)
        with torch.autocast(device.type, torch.bfloat16):
            _neck(net, x)  # builds the tables of this grid, and the graphs
            with _no_synchronisation(device):
                _neck(net, x)


@pytest.fixture
def compiled(build, monkeypatch):
    """A network under COMPILE, and the eager one with its weights."""
    torch._dynamo.reset()
    counters.clear()
    if REHEARSED:
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="aot_eager"))

    def pair(window):
        arguments = dict(window_size=window, global_blocks=[3], drop_path_rate=0.2)
        eager = build("rope_vit_reg4_demo16", **arguments)
        net = build("rope_vit_reg4_demo16", compile=True, **arguments)
        net.load_state_dict(move_off_initial_values(eager).state_dict())
        return net, eager

    with torch._inductor.config.patch(fallback_random=True):
        yield pair


@pytest.mark.parametrize("window", [0, 4])
def test_compiled_training_is_the_eager_one(compiled, device, exact, window):
    net, eager = compiled(window)
    for height, width in ((7, 10), (7, 10), (9, 6)):
        x = torch.randn(2, 3, height * 16, width * 16, device=device)
        necks = []
        for each in (net, eager):
            each.train().zero_grad()
            torch.manual_seed(3)
            necks.append(_neck(each, x))
            necks[-1].square().mean().backward()
        assert relative_difference(*necks) < 1e-4
        expected = {k: p.grad for k, p in eager.named_parameters() if p.grad is not None}
        for key, parameter in net.named_parameters():
            if key in expected:
                assert relative_difference(parameter.grad, expected[key]) < 1e-3, key


@pytest.mark.parametrize("window", [0, 4])
def test_compiled_inference_is_the_eager_one(compiled, device, exact, window):
    net, eager = compiled(window)
    net.eval(), eager.eval()
    for height, width in ((8, 12), (11, 50)):
        x = torch.randn(1, 3, height * 16, width * 16, device=device)
        with torch.inference_mode():
            expected = _neck(eager, x)
            assert relative_difference(_neck(net, x), expected) < 1e-4, (height, width)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        half = _neck(net, x).float()
    assert relative_difference(half, expected) < 0.1
    # Windows of one kind and of four, and the global blocks; each precision has graphs of its own.
    assert counters["stats"]["unique_graphs"] == (2 if window == 0 else 5)

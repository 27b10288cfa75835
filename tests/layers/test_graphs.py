"""Which sizes are replayed, and when graphs are dropped. Capturing itself is for tests/gpu."""

import contextlib
import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rope_vit_det.engine.hooks import EMA
from rope_vit_det.layers import graphs
from rope_vit_det.layers.graphs import ReplayedInference
from rope_vit_det.models import create_model


class Graph:
    """Computes at a replay what the captured forward pass gives for the values there are then."""

    def __init__(self, forward, x, pool):
        self.forward, self.x, self.pool = forward, x.clone(), pool
        self.features = {name: torch.full_like(y, torch.nan) for name, y in forward(x).items()}
        self.replays = 0

    def replay(self):
        self.replays += 1
        for name, y in self.forward(self.x).items():
            self.features[name].copy_(y)


class Features(nn.Module):
    """A convolution's output, with the replaying that the backbones have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.replayed = ReplayedInference()
        self.key = None

    def plain(self, x):
        return {"neck": self.conv(x)}

    def forward(self, x):
        return self.replayed(self, self.plain, x, self.key)


@pytest.fixture
def captured(monkeypatch):
    """The graphs that were captured, on a CPU that passes for a GPU."""
    found = []
    is_plain = graphs._is_plain_inference

    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

    def capture(forward, x, pool):
        found.append(Graph(forward, x, pool))
        return graphs._Captured(found[-1], found[-1].x, found[-1].features)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, stream, lambda device: "the same")
    monkeypatch.setattr(graphs, "_is_plain_inference", lambda x: is_plain(OnGPU))
    monkeypatch.setattr(graphs, "capture", capture)
    return found


@pytest.fixture
def module():
    return Features().eval()


def looks(module, *sizes):
    """Looks at random images of these sizes; what it makes of them is what the layer makes."""
    for size in sizes:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(module(x)["neck"], module.conv(x)), size


def test_sizes_are_captured_when_they_come_again(captured, module):
    small, large = (4, 6), (8, 6)
    looks(module, small, large)
    assert not captured
    looks(module, small, large, small, small)
    assert [graph.replays for graph in captured] == [3, 1]
    assert captured[1].pool is captured[0].pool  # they share memory


def test_features_outlast_the_next_image(captured, module):
    x = torch.randn(3, 1, 3, 4, 4)
    with torch.no_grad():
        found = [module(each)["neck"] for each in x]
        assert all(map(torch.equal, found, map(module.conv, x)))
    assert captured[0].replays == 2


def test_weights_that_change_where_they_lie_are_seen_and_others_captured_anew(captured, module):
    looks(module, (4, 4), (4, 4))
    module.conv.weight.data.mul_(2)
    looks(module, (4, 4))
    assert len(captured) == 1 and captured[0].replays == 2
    module.conv.weight.data = module.conv.weight.data * 3
    looks(module, (4, 4), (4, 4))
    module.conv = nn.Conv2d(3, 4, 1)  # in training, which may mean more than values
    looks(module, (4, 4), (4, 4))
    assert len(captured) == 2
    module.eval()
    looks(module, (4, 4), (4, 4))
    assert [graph.replays for graph in captured] == [2, 1, 1]


def test_other_settings_have_graphs_of_their_own(captured, module):
    looks(module, (4, 4), (4, 4))
    module.key = (2, 2)
    looks(module, (4, 4))
    assert len(captured) == 1
    looks(module, (4, 4))
    with torch.inference_mode():  # whose tensors others may not write into
        looks(module, (4, 4), (4, 4))
    looks(module, (4, 4))
    assert [graph.replays for graph in captured] == [1, 2, 1]


def test_training_takes_the_memory_back(captured, module):
    looks(module, (4, 4), (4, 4))
    module.train()(torch.randn(1, 3, 4, 4))["neck"].sum().backward()
    assert module.conv.weight.grad is not None
    module.eval()
    looks(module, (4, 4))
    assert len(captured) == 1 and captured[0].replays == 1
    looks(module, (4, 4))
    assert len(captured) == 2 and captured[1].pool is not captured[0].pool


def test_whoever_looks_inside_sees_it_all(captured, module):
    x = torch.randn(1, 3, 4, 4)
    looks(module, (4, 4), (4, 4))
    seen = []
    handle = module.conv.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        module(x)
    handle.remove()
    assert len(seen) == 1
    handle = module.register_forward_hook(lambda *args: seen.append(args))
    looks(module, (4, 4))
    handle.remove()
    assert len(seen) == 2 and captured[0].replays == 2  # this one misses nothing
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert counter.get_total_flops() == 2 * 3 * 4 * 16
    module(x)["neck"].sum().backward()
    assert module.conv.weight.grad is not None
    with torch.no_grad():
        traced = torch.jit.trace(module, x, strict=False, check_trace=False)
        assert torch.equal(traced(x * 2)["neck"], module.conv(x * 2))
        assert torch.equal(torch.func.vmap(module)(x[None])["neck"][0], module.conv(x))
    assert captured[0].replays == 2


def test_the_longest_unused_is_dropped_for_memory(captured, module, monkeypatch):
    a, b, c = (4, 4), (4, 8), (4, 12)
    bytes_of_a = 4 * (3 + 4) * 16  # its images and features
    monkeypatch.setattr(ReplayedInference, "max_held_bytes", 4 * bytes_of_a)
    looks(module, a, a, b, b, a)
    looks(module, c, c, a)  # a and c have room, the three of them have not
    assert [graph.replays for graph in captured] == [3, 1, 1]
    looks(module, b)
    assert len(captured) == 3
    looks(module, b)
    assert len(captured) == 4
    monkeypatch.setattr(ReplayedInference, "max_held_bytes", 1)
    looks(module, b, b, b)  # one stays whatever it needs
    assert [graph.replays for graph in captured] == [3, 1, 1, 4]


def test_what_cannot_be_captured_is_told_once_and_computed(captured, module, monkeypatch, caplog):
    def refuse(forward, x, pool):
        held.append(weakref.ref(forward(x)["neck"]))
        raise RuntimeError("operation not permitted when stream is capturing")

    def end(device, pool):
        assert held[0]() is None and pool is not None

    held = []
    monkeypatch.setattr(graphs, "capture", refuse)
    monkeypatch.setattr(graphs, "end_failed_capture", end)
    with caplog.at_level(logging.WARNING):
        looks(module, *[(4, 4)] * 4, *[(8, 8)] * 3)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "Inference goes on without CUDA graphs"
    ]
    assert "not permitted" in caplog.text and len(held) == 1


def test_large_batches_keep_the_gpu_busy_as_they_are(captured, module, monkeypatch):
    monkeypatch.setattr(ReplayedInference, "max_pixels", 32)
    looks(module, *[(4, 8)] * 2, *[(4, 9)] * 3)
    assert len(captured) == 1
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(3, 3, 4, 4))
    assert len(captured) == 1


def test_averaged_weights_leave_the_memory_to_training(captured, module):
    average = EMA(module, 0.9)
    looks(average.model, (4, 4), (4, 4))
    average.after_step()
    looks(average.model, (4, 4))
    assert len(captured) == 1
    looks(average.model, (4, 4))
    assert len(captured) == 2


def test_no_garbage_is_collected_while_capturing(monkeypatch):
    """Some of it ends the capture as it is destroyed."""
    seen = []

    class Fake:
        def __getattr__(self, name):
            return lambda *args, **kwargs: seen.append((name, gc.isenabled()))

    for name in ("CUDAGraph", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: Fake())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def forward(x):
        seen.append(("forward", gc.isenabled()))
        if fails and not gc.isenabled():
            raise ValueError("of the network")
        return {"neck": x}

    names = ["forward", "wait_stream", "capture_begin", "forward", "capture_end", "wait_stream"]
    for fails in (False, True):
        seen.clear()
        with pytest.raises(ValueError, match="network") if fails else contextlib.nullcontext():
            graphs.capture(forward, torch.zeros(1), None)
        assert [name for name, _ in seen] == names[: 5 if fails else 6]
        assert [collects for _, collects in seen[:5]] == [True, True, False, False, False]
        assert gc.isenabled()


def test_copies_capture_for_themselves(captured, module):
    looks(module, (4, 4), (4, 4))
    twin = copy.deepcopy(module)
    looks(twin, (4, 4), (4, 4))
    assert [graph.replays for graph in captured] == [1, 1]


def test_a_table_is_not_kept_that_was_made_while_capturing(monkeypatch):
    """Its values come with the first replay, and it lies in the memory of the graph."""
    net = create_model("rope_vit_reg4_demo16").eval()
    monkeypatch.setattr("rope_vit_det.layers.rope.is_capturing", lambda device: True)
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 96))
    assert not net.rope._tables
    monkeypatch.undo()
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 96))
    assert net.rope._tables

"""What torch does not document is still there, and does what this package uses it for."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from rope_vit_det.utils import torch_private


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_onednn_linear_is_a_linear_layer():
    assert torch_private.has_onednn_linear(), "torch.ops.mkldnn._linear_pointwise is gone"
    layer, x = nn.Linear(48, 32), torch.randn(2, 70, 48)
    found = torch_private.onednn_linear(x, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, layer(x).detach())


def test_an_assertion_stays_in_what_export_writes():
    class Checked(nn.Module):
        def forward(self, x):
            rest = torch.scalar_tensor(x.shape[0], dtype=torch.int64) % 2
            torch_private.assert_in_graph(rest == 0, "not even")
            return x + 1

    sizes = ({0: torch.export.Dim("n", min=2, max=8)},)
    program = torch.export.export(Checked(), (torch.zeros(4),), dynamic_shapes=sizes)
    torch_private.drop_guards(program)
    run = program.module()
    assert run(torch.zeros(6)).shape == (6,)
    with pytest.raises(RuntimeError, match="not even"):
        run(torch.zeros(5))
    with pytest.raises((RuntimeError, AssertionError), match="<= 8"):
        run(torch.zeros(10))


def test_a_marked_size_makes_no_new_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x * x.shape[0], backend=count, fullgraph=True)
    with torch_private.compile_settings(recompile_limit=1, automatic_dynamic_shapes=False):
        for size in (3, 5, 7):
            x = torch.ones(size)
            torch_private.mark_dynamic(x, [0])
            assert compiled(x).sum() == size * size
    assert len(graphs) == 1


def test_a_mode_that_sees_operations_is_seen():
    assert not torch_private.are_operations_watched()
    with FlopCounterMode(display=False):
        assert torch_private.are_operations_watched()
    assert not torch_private.are_operations_watched()


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_what_ends_a_failed_capture_is_there():
    """tests/models/test_compile_for_gpus.py calls it, which takes minutes."""
    used = (torch._C, "_cuda_endAllocateToPool"), (torch.Generator, "graphsafe_set_state")
    assert not [name for owner, name in used if not hasattr(owner, name)]


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

"""What this package uses of torch that torch does not document, in one place.

A new version may take each of these away; `tests/utils/test_torch_private.py` then says which.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules import module as _module


def has_onednn_linear() -> bool:
    """Whether this build of torch has :func:`onednn_linear`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` on the CPU, by oneDNN instead of MKL."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook, global ones included, or a patched `forward` would notice their calls."""
    return bool(_module._has_any_global_hook()) or any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        for module in modules
    )


def are_operations_watched() -> bool:
    """Whether a mode is at work that sees every operation, such as a counter of FLOPs."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, …) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def assert_in_graph(condition: Tensor, message: str) -> None:
    """An assertion on a tensor, which stays in what `torch.export` writes."""
    torch._assert_async(condition, message)


def drop_guards(program: ExportedProgram) -> None:
    """Takes out what newer versions of torch conclude from ranges of sizes; the ranges stay."""
    if hasattr(program, "_guards_code"):
        program._guards_code = []


def mark_dynamic(x: Tensor, dims: Sequence[int]) -> None:
    """Sizes of a tensor for which a compiled graph is not to be made anew."""
    torch._dynamo.maybe_mark_dynamic(x, dims)


def compile_settings(**settings: Any) -> AbstractContextManager:
    """Settings of `torch.compile` within a block."""
    patch: AbstractContextManager = torch._dynamo.config.patch(**settings)
    return patch


def graph_options(x: Tensor, dynamic: bool) -> dict[str, Any] | None:
    """Options of `torch.compile` that a graph needs.

    On GPUs, torch 2.11's analysis of memory access fails on graphs of any size.
    """
    name = "triton.coalesce_tiling_analysis"
    if dynamic and x.is_cuda and name in torch._inductor.list_options():
        return {name: False}
    return None


def end_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Ends what the failed capture of a CUDA graph leaves behind up to torch 2.11.

    Its memory would count as being allocated for the graph, and random numbers as being captured.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # newer ones have ended it
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def clip_each_norm(gradients: list[Tensor], most: float, norm_type: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` of each gradient alone, in a few calls for all."""
    norms = torch.stack(torch._foreach_norm(gradients, norm_type))[:, None]
    factors = most / (torch.linalg.vector_norm(norms, norm_type, dim=1) + 1e-6)
    torch._foreach_mul_(gradients, factors.clamp(max=1.0).unbind())

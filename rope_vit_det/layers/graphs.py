"""Forward passes as graphs: whether one is being written down, and CUDA graphs of inference."""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.torch_private import (
    are_operations_watched,
    are_watched,
    end_failed_capture,
    is_transformed,
)

logger = logging.getLogger(__name__)
Features = dict[str, Tensor]
# One capture at a time in a process, and no replay while its images are being changed.
_LOCK = threading.Lock()


def is_building_graph() -> bool:
    """True under `torch.compile`, `torch.export` and `torch.jit.trace`.

    Whatever looks at a size then (a cache, a shortcut) would bake that size into the graph.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_capturing(device: torch.device) -> bool:
    """True where a CUDA graph is being captured.

    It has sizes and addresses: what is computed then has no values yet, and what others may free
    later is not for it to read.
    """
    # Fake tensors are "on" a GPU that need not be there.
    is_there = device.type == "cuda" and torch.cuda.is_initialized()
    return is_there and torch.cuda.is_current_stream_capturing()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    features: Features

    def nbytes(self) -> int:
        return sum(y.nbytes for y in (self.x, *self.features.values()))


class ReplayedInference:
    """Inference of a module as CUDA graphs, of sizes that it meets more than once.

    One image at a time, launching its kernels takes longer than they run; a graph is launched at
    once. The second image of a size is when it is captured. Training, hooks of the module's parts
    and whatever else looks inside get the plain forward pass, as does all once capturing has
    failed, which is logged.
    """

    # Of a batch: with more, it is the GPU that the host waits for.
    max_pixels = 2 * 1024**2
    # Inputs and features of its graphs, about 20 of 800 x 1216 px under a pyramid; what lies in
    # between shares its memory.
    max_held_bytes = 2 * 2**30

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._addresses: list[int] = []
        self._pool: Any = None
        self._works = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies and pickles capture anew

    def clear(self) -> None:
        """Gives the memory of all graphs back."""
        with _LOCK:
            self._graphs.clear()

    def __call__(
        self, module: nn.Module, forward: Callable[[Tensor], Features], x: Tensor, *key: Hashable
    ) -> Features:
        """What ``forward`` makes of ``x``.

        Args:
            module: whose forward pass it is.
            forward: from images to features; it waits for nothing that is on the GPU.
            x: (N, 3, H, W).
            key: what else the graph depends on.
        """
        if is_building_graph():
            return forward(x)
        if module.training:
            self.clear()  # for what training needs
            return forward(x)
        if not self._works or not _is_plain_inference(x) or x.numel() > 3 * self.max_pixels:
            return forward(x)
        modules = list(module.modules())
        # What watches the module itself sees images and features.
        if are_watched(modules[1:]) or any(each.training for each in modules):
            return forward(x)
        # A graph reads weights where they lay when it was captured.
        held = (each for m in modules for each in (m._parameters, m._buffers))
        addresses = [t.data_ptr() for each in held for t in each.values() if t is not None]
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        size = (x.shape, x.dtype, x.device, dtype, torch.is_inference_mode_enabled(), *key)
        with _LOCK:
            if addresses != self._addresses:
                self._graphs.clear()
                self._addresses = addresses
            if size in self._graphs and self._ensure_captured(size, forward, x):
                return self._replay(size, x)
            if self._works:
                self._graphs[size] = None  # the next one is captured
        return forward(x)

    def _ensure_captured(
        self, size: Hashable, forward: Callable[[Tensor], Features], x: Tensor
    ) -> bool:
        """Captures a graph of this size where there is none; whether there is one then."""
        if self._graphs[size] is not None:
            return True
        if not any(self._graphs.values()):  # else it is shared
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._graphs[size] = capture(forward, x, self._pool)
        except RuntimeError as error:
            logger.warning("Inference goes on without CUDA graphs: %s", error)
            self._works = False
        if not self._works:  # the error held what had been computed
            self._graphs.clear()
            end_failed_capture(x.device, self._pool)
        return self._works

    def _replay(self, size: Hashable, x: Tensor) -> Features:
        self._graphs.move_to_end(size)
        held = {key: each.nbytes() for key, each in self._graphs.items() if each}
        while len(held) > 1 and sum(held.values()) > self.max_held_bytes:
            oldest = next(iter(held))
            del held[oldest], self._graphs[oldest]
        captured = self._graphs[size]
        assert captured is not None
        captured.x.copy_(x)
        captured.graph.replay()
        # The next replay, of whatever size, writes into the same memory.
        return {name: y.clone() for name, y in captured.features.items()}


def capture(forward: Callable[[Tensor], Features], x: Tensor, pool: Any) -> _Captured:
    """A CUDA graph of a forward pass.

    `torch.cuda.graph` would first empty the allocator's cache and collect garbage, which takes
    longer than ten images.

    Args:
        pool: of the memory that it shares with other graphs.
    """
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    forward(static)  # what is compiled, tuned and loaded at first
    # Weights that autocast cast outside the graph are not for it to read, nor the reverse.
    torch.clear_autocast_cache()
    stream, current = _side_stream(x.device), torch.cuda.current_stream(x.device)
    stream.wait_stream(current)
    # What the collector destroys may be a kernel or a graph, which ends a capture.
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            with torch.inference_mode(False):  # its random state may serve other graphs
                # Other threads (of data loaders, of NCCL) may call CUDA meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                features = forward(static)
            except BaseException:
                with suppress(RuntimeError):  # which says less
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        torch.clear_autocast_cache()
        if is_collecting:
            gc.enable()
    current.wait_stream(stream)
    return _Captured(graph, static, features)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to capture on: one, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


def _is_plain_inference(x: Tensor) -> bool:
    """Whether nothing but the values of a forward pass on the GPU is wanted."""
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and not (is_transformed() or are_operations_watched())
        and torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device)
    )

"""Forward passes as graphs: whether one is being written down, and CUDA graphs of inference."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.torch_private import are_operations_watched, are_watched, is_transformed

logger = logging.getLogger(__name__)
Features = dict[str, Tensor]


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
    once. The second image of a size is when it is captured. Training, hooks and whatever else looks
    inside get the plain forward pass, as does all once capturing has failed, which is logged.
    """

    # Inputs and features of its graphs: about 20 of 800 x 1216 px under a pyramid. What lies in
    # between shares its memory. All of it is given back when training goes on.
    max_held_bytes = 2 * 2**30

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._addresses: list[int] = []
        self._works = True
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies and pickles capture anew

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
        if module.training:
            self._graphs.clear()
        if module.training or not self._works or not _is_plain_inference(x):
            return forward(x)
        modules = list(module.modules())
        if are_watched(modules):
            return forward(x)
        # A graph reads weights where they lay when it was captured.
        held = (each for m in modules for each in (m._parameters, m._buffers))
        addresses = [t.data_ptr() for each in held for t in each.values() if t is not None]
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        size = (x.shape, x.dtype, x.device, dtype, torch.is_inference_mode_enabled(), *key)
        with self._lock:
            if addresses != self._addresses:
                self._graphs.clear()
                self._addresses = addresses
            if size not in self._graphs:
                self._graphs[size] = None
                return forward(x)
            try:
                captured = self._graphs[size] or self._capture(forward, x)
            except RuntimeError as error:
                self._graphs.clear()
                self._works = False
                logger.warning("Inference goes on without CUDA graphs: %s", error)
                return forward(x)
            self._graphs[size] = captured
            self._graphs.move_to_end(size)
            self._forget_oldest()
            captured.x.copy_(x)
            captured.graph.replay()
            # The next replay, of whatever size, writes into the same memory.
            return {name: y.clone() for name, y in captured.features.items()}

    def _capture(self, forward: Callable[[Tensor], Features], x: Tensor) -> _Captured:
        pool = next((each.graph.pool() for each in self._graphs.values() if each), None)
        return capture(forward, x, pool)

    def _forget_oldest(self) -> None:
        held = {key: each.nbytes() for key, each in self._graphs.items() if each}
        while len(held) > 1 and sum(held.values()) > self.max_held_bytes:
            oldest = next(iter(held))
            del held[oldest], self._graphs[oldest]


def capture(forward: Callable[[Tensor], Features], x: Tensor, pool: Any) -> _Captured:
    """A CUDA graph of a forward pass, without what `torch.cuda.graph` clears and collects before.

    Args:
        pool: of the graphs that share memory; None: a new one.
    """
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    stream, current = _side_stream(x.device), torch.cuda.current_stream(x.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        forward(static)  # what is compiled, tuned and loaded at first
        # Weights that autocast cast outside the graph are not for it to read, nor the reverse.
        torch.clear_autocast_cache()
        # Other threads (of data loaders, of NCCL) may call CUDA meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            features = forward(static)
        except BaseException:
            with suppress(RuntimeError):  # which says less
                graph.capture_end()
            raise
        finally:
            torch.clear_autocast_cache()
        graph.capture_end()
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
        and not is_building_graph()
        and not (is_transformed() or are_operations_watched())
        and torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device)
    )

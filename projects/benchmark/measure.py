"""Time and memory of one call, and the machine that took them."""

import copy
import ctypes
import datetime
import gc
import platform
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rope_vit_det.errors import InputError
from rope_vit_det.layers import cpu
from rope_vit_det.utils.memory import process_peak_mib

_PACKAGES = (
    "torch",
    "torchvision",
    "detectron2",
    "birder",
    "timm",
    "onnxruntime",
    "openvino",
    "nncf",
)
_CLEAR_PEAK = "5"  # Linux's proc(5): resets VmHWM, the peak of the resident memory


def forward_call(model: nn.Module, image: Tensor, bf16: bool) -> Callable[[], Tensor]:
    """Inference on a batch of images."""

    @torch.inference_mode()
    def call() -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            return model(image)

    return call


def training_call(model: nn.Module, image: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward and backward pass; the gradients are there afterwards, and gone before the next."""
    weight: list[Tensor] = []

    def call() -> None:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            out = model(image)
        if not weight:
            weight.append(torch.randn_like(out))
        for parameter in model.parameters():
            parameter.grad = None
        out.backward(weight[0])

    return call


@dataclass(frozen=True)
class InMode:
    """A call with the model in training or evaluation mode; switching to it is not timed."""

    model: nn.Module
    train: bool
    call: Callable[[], object]

    def prepare(self) -> None:
        self.model.train(self.train)

    def __call__(self) -> object:
        self.prepare()
        return self.call()


def linear_layers_call(net: nn.Module, tokens: int, bf16: bool) -> tuple[Callable[[], None], int]:
    """The linear layers of a network on that many tokens, and nothing else of it.

    Returns:
        The call, and its floating-point operations.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    # Each by the kernel, and on as many tokens at a time, as in the network itself.
    layers = [
        copy.deepcopy(module).to(dtype) for module in net.modules() if isinstance(module, nn.Linear)
    ]
    device = layers[0].weight.device
    inputs = {
        width: torch.randn(1, tokens, width, device=device, dtype=dtype)
        for width in {layer.in_features for layer in layers}
    }

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:  # as the blocks run them in inference
            x = inputs[layer.in_features]
            if device.type != "cpu":
                layer(x)
                continue
            parts = x.chunk(-(-tokens // cpu._PART_TOKENS), dim=1)
            torch.cat([cpu.linear(layer, part) for part in parts], dim=1)

    return call, 2 * tokens * sum(layer.weight.numel() for layer in layers)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call."""
    if isinstance(call, InMode):
        call.prepare()
        call = call.call
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def interleaved(
    calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int, warm_up: int = 1
) -> list[list[float] | str]:
    """Seconds of every call in each round; a round makes every call once.

    Args:
        warm_up: rounds before these, whose times do not count.

    Returns:
        For each call its times; or why it failed, as the others go on.
    """
    times: list[list[float] | str] = [[] for _ in calls]
    for turn in range(-warm_up, repeats):
        for i, call in enumerate(calls):
            taken = times[i]
            if isinstance(taken, str):
                continue
            try:
                duration = seconds(call, device)
            except torch.OutOfMemoryError:
                times[i] = "more memory than the device has"
                continue
            except RuntimeError as error:  # of the compiler's, too
                traceback.print_exc()
                times[i] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                continue
            if turn >= 0:
                taken.append(duration)
    return times


def resident_peak_mib(call: Callable[[], object]) -> float:
    """:func:`peak_mib` of a call on the CPU.

    Raises:
        InputError: this system does not say.
    """
    peak = peak_mib(call, torch.device("cpu"))
    if peak is None:
        raise InputError("the peak of the resident memory can be measured on Linux only")
    return peak


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of one call beyond what was held before it, in MiB.

    On a GPU the allocator's, without CUDA graphs, which hold as much all the time; on Linux the
    resident memory's; None where neither can be had.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):  # ours are for the default one
            call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # What was freed but kept by the C library would not count as new.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
        before = resident_mib()
    except (OSError, AttributeError):
        return None
    call()
    return process_peak_mib() - before


def resident_mib() -> float:
    """Resident memory of this process, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def today() -> str:
    return datetime.date.today().isoformat()


def machine(device: torch.device) -> dict[str, Any]:
    """The device's name and kind, the number of threads, and versions of what runs on it.

    "kind" is "cuda" and the name, or "cpu" with or without AMX; see :mod:`projects.benchmark.bars`.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"cuda {name}"
    else:
        lines = {key.strip(): value.strip() for key, _, value in _cpuinfo()}
        name = lines.get("model name") or platform.processor() or platform.machine()
        kind = f"cpu {'with' if 'amx_bf16' in lines.get('flags', '').split() else 'without'} AMX"
    threads = torch.get_num_threads()
    return {"device": name, "kind": kind, "threads": threads, "versions": versions}


def _cpuinfo() -> list[tuple[str, str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":") for line in lines]

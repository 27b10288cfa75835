"""Peak memory of a training step, each network in a process of its own."""

import multiprocessing
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate

from projects.benchmark.measure import resident_peak_mib
from projects.benchmark.networks import CONTESTANTS, OUR_NETWORK, NetworkOptions, is_installed
from rope_vit_det.errors import InputError
from rope_vit_det.layers import cpu
from rope_vit_det.utils.memory import process_peak_mib

# Ours at the pyramids' stride; birder's on the same grid at its own patch size.
PATCH_STRIDE = 16


def measure_memory(
    networks: Sequence[str] = ("global", "windowed", "birder"),
    *,
    grid: tuple[int, int] = (64, 64),
    batch_size: int = 1,
    bf16: bool = False,
    variant: str = OUR_NETWORK,
    window_size: int = 16,
) -> list[dict[str, Any]]:
    """Measures forward and backward pass on the CPU; ours also with activation checkpointing.

    A fresh process builds the network, its gradients and the image, warms up on a small image, and
    then takes the step that is measured: the peak is that of the resident memory (Linux).

    Args:
        networks: names of `CONTESTANTS`.
        grid: (h, w) in patch tokens: each network gets the image that it makes such a grid of.

    Returns:
        A dict a network: "network", "activation_checkpoint", "step_mib" (the peak beyond
        interpreter, weights, gradients and image), "process_mib" (the peak of the process),
        "of_plain" ("step_mib" of the same network without checkpointing, over this one's).

    Raises:
        InputError: an unknown network, or no such measurement on this system.
    """
    if unknown := [name for name in networks if name not in CONTESTANTS]:
        raise InputError(f"unknown network {unknown[0]!r}; known are {', '.join(CONTESTANTS)}")
    options = NetworkOptions(variant, PATCH_STRIDE, window_size)
    context = multiprocessing.get_context("spawn")
    results: list[dict[str, Any]] = []
    for name in networks:
        if not is_installed(CONTESTANTS[name].needs):
            continue
        for checkpointing in (False, True) if CONTESTANTS[name].ours else (False,):
            with context.Pool(1) as pool:
                step, process = pool.apply(
                    _measure_step, (name, options, checkpointing, grid, batch_size, bf16)
                )
            plain = results[-1]["step_mib"] if checkpointing else step
            results.append(
                {
                    "network": name,
                    "activation_checkpoint": checkpointing,
                    "step_mib": step,
                    "process_mib": process,
                    "of_plain": plain / step,
                }
            )
    return results


def format_memory(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    rows = [
        [
            result["network"] + (", checkpointed" if result["activation_checkpoint"] else ""),
            f"{result['step_mib']:.0f}",
            f"{result['process_mib']:.0f}",
            f"{result['of_plain']:.2f}" if result["activation_checkpoint"] else "",
        ]
        for result in results
    ]
    headers = ["network", "step's peak, MiB", "process's peak, MiB", "times less"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _measure_step(
    name: str,
    options: NetworkOptions,
    checkpointing: bool,
    grid: tuple[int, int],
    batch_size: int,
    bf16: bool,
) -> tuple[float, float]:
    torch.manual_seed(0)
    model = CONTESTANTS[name].build(options).train()
    if checkpointing:
        model.net.activation_checkpoint = True

    def images(height: int, width: int) -> torch.Tensor:
        return torch.randn(batch_size, 3, height * model.patch, width * model.patch)

    def step(image: torch.Tensor) -> None:
        # As on a GPU, autocast is followed.
        with (
            patch.object(cpu, "_SLOW_BF16", False),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        ):
            loss = model(image).float().square().mean()
        loss.backward()  # adds to the gradients that are there

    step(images(4, 4))
    image = images(*grid)
    return resident_peak_mib(lambda: step(image)), process_peak_mib()

"""The rounds of a benchmark: every network after every other, again and again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from projects.benchmark.bars import check_bars
from projects.benchmark.measure import (
    InMode,
    forward_call,
    interleaved,
    linear_layers_call,
    machine,
    peak_mib,
    today,
    training_call,
)
from projects.benchmark.networks import (
    CONTESTANTS,
    OUR_NETWORK,
    FeatureMap,
    NetworkOptions,
    forward_flops,
    is_installed,
    share_parameters,
)
from rope_vit_det.errors import InputError

PRECISIONS = ("fp32", "bf16")
MODES = ("forward", "training")


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure.

    Attributes:
        grids: (h, w) in patch tokens; a network gets the image that its patches make such a grid
            of, so that all of them work on the same number of tokens.
        networks: names of `CONTESTANTS`.
        precisions: "fp32", and "bf16" under autocast.
        modes: "forward" (inference) and "training" (forward and backward pass).
        compiled: measures ours as MODEL.ROPE_VIT.COMPILE runs them as well.
        patch_stride: of our network, in pixels; None: its own patch size.
        repeats: rounds, after one that only warms up.
    """

    grids: Sequence[tuple[int, int]] = ((64, 64),)
    networks: Sequence[str] = tuple(CONTESTANTS)
    precisions: Sequence[str] = PRECISIONS
    modes: Sequence[str] = ("forward",)
    compiled: bool = False
    batch_size: int = 1
    repeats: int = 5
    device: str = "cpu"
    variant: str = OUR_NETWORK
    patch_stride: int | None = None
    window_size: int = 16


@dataclass(frozen=True)
class _Case:
    """One thing that is timed, as the keys that name it in the report."""

    label: dict[str, Any]
    call: Callable[[], object]
    flops: int


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measures, interleaved: each round times every case once, so that drift meets all of them.

    Returns:
        A JSON-like dict: "date", "machine", "options", "absent" (peers that are not installed),
        "failed" (what was not measured, and why), "output_difference" (global against birder),
        "matrix_rate", "measurements", "bars".

    Raises:
        InputError: an unknown name, or a device that is not there.
    """
    _check(options)
    device = torch.device(options.device)
    torch.manual_seed(0)
    present = [n for n in options.networks if is_installed(CONTESTANTS[n].needs)]
    network_options = NetworkOptions(options.variant, options.patch_stride, options.window_size)
    models = {name: CONTESTANTS[name].build(network_options).to(device) for name in present}
    ours = [name for name in present if CONTESTANTS[name].ours]
    compiled = {
        name: CONTESTANTS[name].build(replace(network_options, compile=True)).to(device)
        for name in (ours if options.compiled else ())
    }
    share_parameters([models[name] for name in ours] + [*compiled.values()], models.get("birder"))
    floor_net = CONTESTANTS["global"].build(network_options).to(device).net

    cases, floors = [], []
    for grid in options.grids:
        cases += _cases(options, models, compiled, grid, device)
        for precision in options.precisions:
            call, flops = linear_layers_call(
                floor_net, options.batch_size * grid[0] * grid[1], precision == "bf16"
            )
            floors.append(_Case({"precision": precision, "grid": list(grid)}, call, flops))
    calls = [case.call for case in (*floors, *cases)]
    times = interleaved(calls, device, repeats=options.repeats)
    rates = [
        {**case.label, "gflops": case.flops / median(taken) / 1e9}
        for case, taken in zip(floors, times, strict=False)
        if not isinstance(taken, str)
    ]
    measurements, failed = [], []
    for case, taken in zip(cases, times[len(floors) :], strict=True):
        if isinstance(taken, str):
            failed.append({**case.label, "why": taken})
            continue
        own = (case.label["precision"], case.label["grid"])
        rate = next((r["gflops"] for r in rates if (r["precision"], r["grid"]) == own), math.nan)
        measurements.append(
            {
                **case.label,
                "median_s": median(taken),
                "seconds": taken,
                "peak_mib": peak_mib(case.call, device),
                "gflops": case.flops / median(taken) / 1e9,
                "share_of_matrix_rate": case.flops / median(taken) / 1e9 / rate,
            }
        )
    where = machine(device)
    return {
        "date": today(),
        "machine": where,
        "options": {**vars(options), "grids": [list(grid) for grid in options.grids]},
        "absent": [n for n in options.networks if n not in present],
        "failed": failed,
        "output_difference": _output_difference(models, options.grids[0], device),
        "matrix_rate": rates,
        "measurements": measurements,
        "bars": check_bars(measurements, where["kind"]),
    }


def _check(options: BenchmarkOptions) -> None:
    for key, allowed in (("networks", CONTESTANTS), ("precisions", PRECISIONS), ("modes", MODES)):
        if unknown := [value for value in getattr(options, key) if value not in allowed]:
            raise InputError(f"{key}: unknown {unknown[0]!r}; known are {', '.join(allowed)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {options.device}: this machine has no GPU; use cpu")


def _cases(
    options: BenchmarkOptions,
    models: dict[str, FeatureMap],
    compiled_models: dict[str, FeatureMap],
    grid: tuple[int, int],
    device: torch.device,
) -> list[_Case]:
    cases = []
    for name, model in models.items():
        size = (grid[0] * model.patch, grid[1] * model.patch)
        image = torch.randn(options.batch_size, 3, *size, device=device)
        flops = options.batch_size * forward_flops(model, size)
        for mode in options.modes:
            for precision in options.precisions:
                for compiled in (False, True) if name in compiled_models else (False,):
                    label = {
                        "network": name,
                        "mode": mode,
                        "precision": precision,
                        "compiled": compiled,
                        "grid": list(grid),
                        "image": list(size),
                        "batch_size": options.batch_size,
                    }
                    run = compiled_models[name] if compiled else model
                    make = forward_call if mode == "forward" else training_call
                    call = InMode(run, mode == "training", make(run, image, precision == "bf16"))
                    cases.append(_Case(label, call, flops * (1 if mode == "forward" else 3)))
    return cases


def _output_difference(
    models: dict[str, FeatureMap], grid: tuple[int, int], device: torch.device
) -> float | None:
    """Largest difference of our global network from birder's, over the largest value, in fp32."""
    if not {"global", "birder"} <= models.keys():
        return None
    ours, oracle = models["global"], models["birder"]
    if ours.patch != oracle.patch:
        return None
    image = torch.randn(1, 3, grid[0] * ours.patch, grid[1] * ours.patch, device=device)
    expected = forward_call(oracle.eval(), image, False)()
    found = forward_call(ours.eval(), image, False)()
    return ((found - expected).abs().max() / expected.abs().max()).item()

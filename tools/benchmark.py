#!/usr/bin/env python3
"""Measures the backbone beside its peers: times, memory, share of the machine's matrix rate.

With --modes step predict: whole detectors, a training step and the inference of one image, ours by
a recipe's yaml, the peers under Detectron2's parts and under the recipe's; of --networks windowed,
global, vitdet and birder, by --sizes, --recipe and --opts.

With --exported: detectors and backbones as exported files beside the eager ones, on the CPU; of the
other options, --networks (rope_vit_reg4_demo16, rope_vit_reg4_b14), --grids, --repeats and --out.

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rope_vit_det.engine.command_line import pixels
from rope_vit_det.errors import InputError, input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    # What is not given keeps the default of BenchmarkOptions.
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--exported", action="store_true", default=False, help="exported files, on the CPU")
    add(
        "--grids",
        nargs="+",
        type=pixels,
        metavar="HxW",
        help="in patch tokens; each network's image has that grid (default: 64x64)",
    )
    add("--networks", nargs="+", help="global, windowed, birder, … (default: all)")
    add("--precisions", nargs="+", choices=("fp32", "bf16"))
    add(
        "--modes",
        nargs="+",
        choices=("forward", "training", "step", "predict"),
        help="default: forward",
    )
    add("--compiled", action="store_true", help="ours under MODEL.ROPE_VIT.COMPILE as well")
    add("--batch-size", type=int)
    add("--sizes", nargs="+", type=pixels, metavar="HxW", help="of a detector's images, in pixels")
    add("--recipe", help="yaml of a Mask R-CNN (default: the 1x recipe)")
    add("--opts", nargs="+", metavar="KEY VALUE", help="over the recipe, and the peers' config")
    add("--repeats", type=int)
    add("--device", help="cpu, cuda, cuda:1, …")
    add("--variant", help="of our network and birder's")
    add("--patch-stride", type=int, help="of our network (default: its own patch size)")
    add("--window-size", type=int)
    add("--out", type=Path, default=None, help="the JSON to write")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    out = args.pop("out")
    exported = args.pop("exported")
    if {"step", "predict"} & set(args.get("modes", ())):
        from projects.benchmark import detectors
        from projects.benchmark.report import format_bars

        known = {"networks", "modes", "sizes", "batch_size", "repeats", "device", "recipe", "opts"}
        _refuse(set(args) - known, "--modes step predict does not use")
        if networks := args.pop("networks", None):
            pairs = {name: [d for d in detectors.DETECTORS if d[0] == name] for name in networks}
            args["detectors"] = [d for name in networks for d in pairs[name] or [(name, "")]]
        if batch_size := args.pop("batch_size", None):
            args["batch_sizes"] = [batch_size]
        results = detectors.run_detectors(detectors.DetectorOptions(**args))
        print(detectors.format_detectors(results), format_bars(results["bars"]), sep="\n\n")
    elif exported:
        from projects.benchmark.exported import format_exported, measure_exported

        _refuse(set(args) - {"networks", "grids", "repeats"}, "--exported does not use")
        results = measure_exported(**args)
        print(format_exported(results))
    else:
        from projects.benchmark import BenchmarkOptions, run_benchmark
        from projects.benchmark.report import format_report

        _refuse(set(args) & {"sizes", "recipe", "opts"}, "only --modes step predict uses")
        results = run_benchmark(BenchmarkOptions(**args))
        print(format_report(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


def _refuse(options: set[str], why: str) -> None:
    if options:
        raise InputError(f"{why} --{min(options).replace('_', '-')}")


if __name__ == "__main__":
    main()

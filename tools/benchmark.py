#!/usr/bin/env python3
"""Measures the backbone beside its peers: times, memory, share of the machine's matrix rate.

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rope_vit_det.engine.command_line import pixels
from rope_vit_det.errors import input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    # What is not given keeps the default of BenchmarkOptions.
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "--grids",
        nargs="+",
        type=pixels,
        metavar="HxW",
        help="in patch tokens; each network's image has that grid (default: 64x64)",
    )
    add("--networks", nargs="+", help="global, windowed, birder, … (default: all)")
    add("--precisions", nargs="+", choices=("fp32", "bf16"))
    add("--modes", nargs="+", choices=("forward", "training"), help="default: forward")
    add("--compiled", action="store_true", help="ours under MODEL.ROPE_VIT.COMPILE as well")
    add("--batch-size", type=int)
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
    from projects.benchmark import BenchmarkOptions, run_benchmark
    from projects.benchmark.report import format_report

    results = run_benchmark(BenchmarkOptions(**args))
    print(format_report(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

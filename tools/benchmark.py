#!/usr/bin/env python3
"""Measures the backbone beside its peers: times, memory, share of the machine's matrix rate.

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.benchmark import BenchmarkOptions, run_benchmark
from projects.benchmark.networks import CONTESTANTS
from projects.benchmark.report import format_report
from projects.benchmark.run import MODES, PRECISIONS
from rope_vit_det.errors import input_errors_as_one_line


def grid(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parse_args() -> argparse.Namespace:
    default = BenchmarkOptions()
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--grids",
        nargs="+",
        type=grid,
        default=default.grids,
        metavar="HxW",
        help="in patch tokens; each network's image has that grid (default: 64x64)",
    )
    add("--networks", nargs="+", choices=CONTESTANTS, default=default.networks)
    add("--precisions", nargs="+", choices=PRECISIONS, default=default.precisions)
    add("--modes", nargs="+", choices=MODES, default=default.modes)
    add("--compiled", action="store_true", help="ours under MODEL.ROPE_VIT.COMPILE as well")
    add("--batch-size", type=int, default=default.batch_size)
    add("--repeats", type=int, default=default.repeats)
    add("--device", default=default.device, help="cpu, cuda, cuda:1, …")
    add("--variant", default=default.variant, help="of our network and birder's")
    add("--patch-stride", type=int, help="of our network (default: its own patch size)")
    add("--window-size", type=int, default=default.window_size)
    add("--out", type=Path, help="the JSON to write")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    out = args.pop("out")
    results = run_benchmark(BenchmarkOptions(**args))
    print(format_report(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

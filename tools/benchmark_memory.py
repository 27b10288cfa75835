#!/usr/bin/env python3
"""Measures the peak memory of a training step beside birder's network, and checkpointed."""

import argparse
import json
from pathlib import Path

from rope_vit_det.benchmark.memory import format_memory, measure_memory
from rope_vit_det.benchmark.networks import CONTESTANTS, OUR_NETWORK
from rope_vit_det.errors import input_errors_as_one_line


def grid(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=CONTESTANTS, default=("global", "windowed", "birder"))
    add("--grid", type=grid, default=(64, 64), metavar="HxW",
        help="in patch tokens; ours: 16 px each, birder's: 14 px (default: 64x64)")  # fmt: skip
    add("--batch-size", type=int, default=1)
    add("--bf16", action="store_true", help="under bf16 autocast")
    add("--variant", default=OUR_NETWORK, help="of our network and birder's")
    add("--window-size", type=int, default=16)
    add("--out", type=Path, help="the JSON to write")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    out = args.pop("out")
    results = measure_memory(**args)
    print(format_memory(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

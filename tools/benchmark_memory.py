#!/usr/bin/env python3
"""Measures the peak memory of a training step: of our network beside birder's, or of a recipe.

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parts = parser.add_subparsers(dest="what", required=True)
    add = parts.add_parser("networks", help="without heads and optimizer").add_argument
    add("--networks", nargs="+", default=("global", "windowed", "birder"))
    add("--grid", type=pixels, default=(64, 64), metavar="HxW",
        help="in patch tokens; ours: 16 px each, birder's: 14 px (default: 64x64)")  # fmt: skip
    add("--batch-size", type=int, default=1)
    add("--bf16", action="store_true", help="under bf16 autocast")
    add("--variant", default="rope_vit_reg4_b14", help="of our network and birder's")
    add("--window-size", type=int, default=16)
    add = parts.add_parser("recipe", help="with heads and optimizer, on the CPU").add_argument
    add("config_file", metavar="CONFIG", help="a yaml recipe of a detector")
    add("--image-size", type=pixels, default=(1024, 1024), metavar="HxW", help="in pixels")
    add("--images", type=int, default=2, help="of a step")
    add("--switches", nargs="+", default=argparse.SUPPRESS, help="default: all")
    add("--opts", nargs="+", default=(), metavar="KEY VALUE", help="for all of them")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    out, what = args.pop("out"), args.pop("what")
    if what == "networks":
        from projects.benchmark.memory import format_memory as show
        from projects.benchmark.memory import measure_memory as measure
    else:
        from projects.benchmark.recipe_memory import format_recipe as show
        from projects.benchmark.recipe_memory import measure_recipe as measure
    results = measure(**args)
    print(show(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

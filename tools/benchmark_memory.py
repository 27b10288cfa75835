#!/usr/bin/env python3
"""Measures the peak memory of a training step: of our network beside birder's, or of a recipe.

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.benchmark.memory import format_memory, measure_memory
from projects.benchmark.networks import CONTESTANTS, OUR_NETWORK
from projects.benchmark.recipe_memory import SWITCHES, format_recipe, measure_recipe
from rope_vit_det.engine.command_line import pixels
from rope_vit_det.errors import input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parts = parser.add_subparsers(dest="what", required=True)
    add = parts.add_parser("networks", help="without heads and optimizer").add_argument
    add("--networks", nargs="+", choices=CONTESTANTS, default=("global", "windowed", "birder"))
    add("--grid", type=pixels, default=(64, 64), metavar="HxW",
        help="in patch tokens; ours: 16 px each, birder's: 14 px (default: 64x64)")  # fmt: skip
    add("--batch-size", type=int, default=1)
    add("--bf16", action="store_true", help="under bf16 autocast")
    add("--variant", default=OUR_NETWORK, help="of our network and birder's")
    add("--window-size", type=int, default=16)
    add = parts.add_parser("recipe", help="with heads and optimizer, on the CPU").add_argument
    add("config_file", metavar="CONFIG", help="a yaml recipe of a detector")
    add("--image-size", type=pixels, default=(1024, 1024), metavar="HxW", help="in pixels")
    add("--images", type=int, default=2, help="of a step")
    add("--switches", nargs="+", choices=SWITCHES, default=tuple(SWITCHES))
    add("--opts", nargs="+", default=(), metavar="KEY VALUE", help="for all of them")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    out, what = args.pop("out"), args.pop("what")
    measure, show = {
        "networks": (measure_memory, format_memory),
        "recipe": (measure_recipe, format_recipe),
    }[what]
    results = measure(**args)
    print(show(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

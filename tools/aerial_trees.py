#!/usr/bin/env python3
"""Trains a small detector on tiles of aerial photographs, and evaluates it on a whole one.

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/aerial_trees"), metavar="FOLDER")
    add("opts", nargs=argparse.REMAINDER, help="after --: KEY VALUE pairs over the config")
    args = parser.parse_args()
    from projects.aerial_trees.run import run

    run(args.output, [value for value in args.opts if value != "--"])


if __name__ == "__main__":
    main()

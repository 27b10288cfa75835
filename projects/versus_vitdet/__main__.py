"""Trains both networks on the demo's data under the demo's heads, from random weights.

python -m projects.versus_vitdet

Leaves results.json, table.md and plot.png in --output. Runs that are there are not made again.
"""

import argparse
from pathlib import Path

from projects.versus_vitdet.report import write_report
from projects.versus_vitdet.run import train_all
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/versus_vitdet"), metavar="FOLDER")
    add("--seeds", type=int, nargs="+", default=[7, 8, 9])
    add("opts", nargs=argparse.REMAINDER, help="after --: KEY VALUE pairs over configs/demo.yaml")
    args = parser.parse_args()
    opts = [value for value in args.opts if value != "--"]
    runs = train_all(args.output, args.seeds, opts)
    print(write_report(runs, args.output))


if __name__ == "__main__":
    main()

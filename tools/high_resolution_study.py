#!/usr/bin/env python3
"""Shows what the switches for high resolution do to a small detector (docs/high_resolution.md).

Runs from the sources: what it calls lies in projects/, which is not installed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rope_vit_det.errors import input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/high_resolution"),
        help="results; a study that was cut off goes on from what is there")  # fmt: skip
    add("--seeds", type=int, default=1, help="trainings to average over (default: 1)")
    add("--fine-tuning-iterations", type=int, default=60)
    add("--scales", type=float, nargs="+", default=argparse.SUPPRESS, help="of the images")
    add("opts", nargs=argparse.REMAINDER, help="after --: KEY VALUE pairs over the config")
    return parser.parse_args()


@input_errors_as_one_line()
def main() -> None:
    args = vars(parse_args())
    opts = [value for value in args.pop("opts") if value != "--"]
    from projects.high_resolution_study.report import write_report
    from projects.high_resolution_study.study import StudyOptions, run_study

    options = StudyOptions(**args)
    results = run_study("high_resolution_study.yaml", options, opts)
    print(write_report(results, options.output))


if __name__ == "__main__":
    main()

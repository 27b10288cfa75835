#!/usr/bin/env python3
"""Writes a training into one HTML page: python tools/report.py OUTPUT_DIR

Config, curves, AP by class and size, precision over recall, confusion, the best and worst images,
timings and memory. The page opens from disk, without a network, and fits a phone.
"""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("output_dir", help="what a training left")
    add("--output", metavar="FILE", help="default: report.html in the folder")
    args = parser.parse_args()
    from rope_vit_det.report import write_report

    print(f"written: {write_report(args.output_dir, args.output)}")


if __name__ == "__main__":
    main()

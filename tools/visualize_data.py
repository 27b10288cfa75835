#!/usr/bin/env python3
"""Draws what the training loader feeds, after augmentation, with boxes, masks and class names."""

import argparse

from rope_vit_det.engine.command_line import add_config_option, add_own_data_options
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_option(parser)
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="for the pictures")
    parser.add_argument("--number", type=int, default=8, help="of samples (default: 8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = add_own_data_options(parser).parse_args()
    from rope_vit_det.visualization.samples import run

    run(args)


if __name__ == "__main__":
    main()

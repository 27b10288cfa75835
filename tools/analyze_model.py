#!/usr/bin/env python3
"""Parameters, multiply-adds and activations of a network or a detector, part by part."""

import argparse

from rope_vit_det.engine.command_line import add_config_option, pixels
from rope_vit_det.errors import input_errors_as_one_line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--network", metavar="NAME", help="a network alone, such as rope_vit_reg4_b14")
    add_config_option(parser)
    add(
        "--size",
        type=pixels,
        default=(1024, 1024),
        metavar="HxW",
        help="of the image, in pixels, or a side of a square (default: 1024)",
    )
    add("--patch-stride", type=int, default=16, help="with --network (default: 16)")
    add(
        "--window-size",
        type=int,
        nargs="+",
        default=[0, 16],
        help="with --network: a table each, 0: global attention (default: 0 16)",
    )
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    if (args.network is None) == (not args.config_file):
        parser.error("give either --network or --config-file")
    return args


@input_errors_as_one_line()
def main() -> None:
    args = parse_args()
    if args.network:
        from rope_vit_det.models.complexity import network_tables

        print(network_tables(args.network, args.size, args.patch_stride, args.window_size))
    else:
        from rope_vit_det.report.analysis import analyze

        print(analyze(args))


if __name__ == "__main__":
    main()

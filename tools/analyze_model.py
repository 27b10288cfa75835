#!/usr/bin/env python3
"""Parameters, multiply-adds and activations of a network or a detector, part by part."""

import argparse

from rope_vit_det.engine.command_line import add_config_option, pixels
from rope_vit_det.errors import InputError, input_errors_as_one_line


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
    add("--patch-stride", type=int, help="with --network (default: 16)")
    add(
        "--window-size",
        type=int,
        nargs="+",
        help="with --network: a table each, 0: global attention (default: 0 16)",
    )
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    if (args.network is None) == (not args.config_file):
        raise InputError("give either --network or --config-file")
    if args.network and args.opts:
        raise InputError(f"{args.opts[0]}: KEY VALUE pairs are for --config-file")
    for option, key in (("patch_stride", "PATCH_STRIDE"), ("window_size", "WINDOW_SIZE")):
        if args.config_file and getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise InputError(f"--{name} is for --network; a config has MODEL.ROPE_VIT.{key}")
    return args


@input_errors_as_one_line()
def main() -> None:
    args = parse_args()
    if args.network:
        from rope_vit_det.models.complexity import network_tables

        stride = 16 if args.patch_stride is None else args.patch_stride
        windows = [0, 16] if args.window_size is None else args.window_size
        if stride < 1:
            raise InputError(f"--patch-stride is {stride}; allowed: 1 or more")
        if min(windows) < 0:
            raise InputError(f"--window-size is {min(windows)}; allowed: 0 or more")
        print(network_tables(args.network, args.size, stride, windows))
    else:
        from rope_vit_det.report.analysis import analyze

        print(analyze(args))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Converts weights: birder's .pt and .safetensors, timm's .safetensors, Detectron2's .pth.

  convert_weights.py rope_vit_reg4_b14_x.pt backbone.pth
  convert_weights.py rope_vit_reg4_b14_x.pt rope_vit_reg4_b14_x.safetensors
  convert_weights.py dinov3_vitb16.pth vit_base_patch16_dinov3.safetensors \
    --network vit_base_patch16_dinov3
  convert_weights.py model_final.pth rope_vit_reg4_b14_det.pt --head-from rope_vit_reg4_b14_x.pt
  convert_weights.py model_final.pth adapters.pth --base rope_vit_reg4_b14_x.pt

A file that is there already stays, unless --force is given.
"""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a published name, .pt, .safetensors or .pth")
    add("output", help=".pt or .safetensors (birder's; timm's), .pth (Detectron2's)")
    add("--network", help="the architecture, where the file does not say it")
    add(
        "--head-from",
        metavar="FILE",
        help="birder's file, or a published name, whose norm, pooling and classifier it gets",
    )
    add(
        "--config-file",
        metavar="FILE",
        help="the config.yaml of the run that trained a detector (default: the one beside it)",
    )
    add(
        "--patch-size",
        type=int,
        metavar="PIXELS",
        help="resample the patch kernel to this size for good",
    )
    add(
        "--add-config",
        metavar="JSON",
        help="entries for the file's config, e.g. '{\"pt_grid_size\": [16, 16]}'",
    )
    add(
        "--base",
        metavar="WEIGHTS",
        help="leave these out, from which a detector with LoRA was trained: adapters and heads "
        "remain, and name them by their sha256",
    )
    add("--force", action="store_true", help="replace a file that is there")
    args = parser.parse_args()
    from rope_vit_det.weights.convert import convert
    from rope_vit_det.weights.info import parse_config

    args.add_config = parse_config(args.add_config, "--add-config")
    print("\n".join(convert(**vars(args))))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Trains a tiny RoPE ViT Mask R-CNN on a generated dataset, in minutes on a CPU (make demo)."""

import argparse

from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    from rope_vit_det.demo import run_demo

    run_demo("demo.yaml", args.opts)


if __name__ == "__main__":
    main()

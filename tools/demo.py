#!/usr/bin/env python3
"""Trains a tiny RoPE ViT Mask R-CNN on a generated dataset, in minutes on a CPU (make demo)."""

import argparse
from pathlib import Path

from rope_vit_det.demo import run_demo
from rope_vit_det.errors import input_errors_as_one_line

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    with input_errors_as_one_line():
        run_demo(str(CONFIG), args.opts)

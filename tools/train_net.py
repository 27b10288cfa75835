#!/usr/bin/env python3
"""Trains or evaluates a RoPE ViT detector, with the command line of Detectron2's train_net.py."""

from detectron2.engine import default_argument_parser

from rope_vit_det.engine.main import run
from rope_vit_det.engine.own_data import add_own_data_options
from rope_vit_det.errors import input_errors_as_one_line

if __name__ == "__main__":
    args = add_own_data_options(default_argument_parser()).parse_args()
    with input_errors_as_one_line():
        run(args)

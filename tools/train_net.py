#!/usr/bin/env python3
"""Trains or evaluates a RoPE ViT detector, with Detectron2's command line; configs may add up."""

from rope_vit_det.engine.command_line import add_own_data_options, argument_parser
from rope_vit_det.engine.main import run
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    run(add_own_data_options(argument_parser()).parse_args())


if __name__ == "__main__":
    main()

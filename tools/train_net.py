#!/usr/bin/env python3
"""Trains or evaluates a RoPE ViT detector, with Detectron2's command line; configs may add up."""

from rope_vit_det.engine.command_line import add_own_data_options, argument_parser
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    args = add_own_data_options(argument_parser()).parse_args()
    from rope_vit_det.engine.main import run  # not before --help, which would wait for it

    run(args)


if __name__ == "__main__":
    main()

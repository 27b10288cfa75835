#!/usr/bin/env python3
"""Trains or evaluates under a LazyConfig, with Detectron2's command line.

A LazyConfig is Python and runs when it is loaded: give only files that you trust.
"""

from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.errors import input_errors_as_one_line


@input_errors_as_one_line()
def main() -> None:
    opts = "train.init_checkpoint=model.pth optimizer.lr=0.001"
    args = argument_parser(opts=opts).parse_args()
    from rope_vit_det.engine.lazy import run_lazy

    run_lazy(args)


if __name__ == "__main__":
    main()

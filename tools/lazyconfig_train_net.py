#!/usr/bin/env python3
"""Trains or evaluates under a LazyConfig, with Detectron2's lazyconfig_train_net.py's command line.

A LazyConfig is Python and runs when it is loaded: give only files that you trust.
"""

from detectron2.engine import launch

from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.lazy import check_lazy_config, evaluate, load_lazy_config, train
from rope_vit_det.engine.setup import setup
from rope_vit_det.errors import input_errors_as_one_line


def main(args):
    # A LazyConfig holds functions, which do not travel to other processes: each loads its own.
    cfg = load_lazy_config(args)
    setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    return train(cfg, resume=args.resume)


if __name__ == "__main__":
    args = argument_parser().parse_args()
    with input_errors_as_one_line():
        check_lazy_config(load_lazy_config(args), eval_only=args.eval_only, resume=args.resume)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )

#!/usr/bin/env python3
"""Trains or evaluates a RoPE ViT detector, with Detectron2's command line; configs may add up."""

from detectron2.engine import launch

from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.main import evaluate, train
from rope_vit_det.engine.setup import check_config, load_config, setup
from rope_vit_det.errors import input_errors_as_one_line


def main(args, cfg):
    setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    return train(cfg, resume=args.resume)


if __name__ == "__main__":
    args = argument_parser().parse_args()
    with input_errors_as_one_line():
        cfg = load_config(args)
        check_config(cfg, eval_only=args.eval_only, resume=args.resume)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
        )

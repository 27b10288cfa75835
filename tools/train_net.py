#!/usr/bin/env python3
"""Trains or evaluates a RoPE ViT detector, with the command line of Detectron2's train_net.py."""

from detectron2.engine import default_argument_parser, launch

from rope_vit_det.engine.main import evaluate, train
from rope_vit_det.engine.setup import check_config, load_config, setup
from rope_vit_det.errors import input_errors_as_one_line


def main(args, cfg):
    setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    return train(cfg, resume=args.resume)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
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

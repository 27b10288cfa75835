#!/usr/bin/env python3
"""A plain Detectron2 training script, with a RoPE ViT in place of its backbone.

    train_plain.py --config-file configs/demo.yaml [--weights NAME_OR_FILE] [KEY VALUE ...]

The config is any with a feature pyramid, such as one of Detectron2's model zoo. Register your own
data where the demo's is registered (tools/demo.py draws it).
"""

import argparse
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator

import rope_vit_det
from rope_vit_det.data import register_demo_dataset


class Trainer(DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return rope_vit_det.build_optimizer(cfg, model)  # Detectron2's own is SGD

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def main(args: argparse.Namespace) -> None:
    register_demo_dataset()
    cfg = get_cfg()
    rope_vit_det.add_rope_vit_config(cfg)
    cfg.merge_from_file(args.config_file)
    rope_vit_det.use_rope_vit(cfg, args.weights)
    # Detectron2's mixed precision is for GPUs.
    cfg.SOLVER.AMP.ENABLED = torch.cuda.is_available()
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        Trainer.test(cfg, model)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--weights", help="a published name or a file; none: random")
    args = parser.parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )

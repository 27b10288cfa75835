"""A LazyConfig and the yaml of the same name are the same recipe."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from stand_in import NAME, cut_down, cut_down_lazy

from rope_vit_det.data.large_scale_jitter import build_train_mapper
from rope_vit_det.engine import Trainer, lazy
from rope_vit_det.engine.setup import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
BOTH = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.py")
    if path.with_suffix(".yaml").exists()
)
ITERATIONS = 5


def from_yaml(name):
    return load_config(Namespace(config_file=[f"{CONFIGS / name}.yaml"], opts=[], num_gpus=1))


def losses(trainer, iterations=ITERATIONS):
    """Losses of the first iterations, the random numbers of each being the same for everyone."""
    found = []
    with EventStorage() as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(iterations):
            torch.manual_seed(trainer.iter)
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            latest = trainer.storage.latest()
            found.append({key: latest[key][0] for key in latest if "loss" in key})
    return found

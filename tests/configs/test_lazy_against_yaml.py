"""A LazyConfig and the yaml of the same name are the same recipe."""

import copy
import itertools
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from stand_in import cut_down, cut_down_lazy

from rope_vit_det.data.large_scale_jitter import build_train_mapper
from rope_vit_det.engine import lazy
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.solver.optimizers import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
BOTH = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.py")
    if path.with_suffix(".yaml").exists()
)
COCO = [name for name in BOTH if name.startswith("COCO")]
ITERATIONS = 5


def from_yaml(name):
    return load_config(Namespace(config_file=[f"{CONFIGS / name}.yaml"], opts=[], num_gpus=1))


def from_python(name):
    return LazyConfig.load(f"{CONFIGS / name}.py")


def losses(trainer, batches, max_iter):
    """All losses of a step on each of the batches, under the recipe's schedule."""
    step = getattr(trainer, "_trainer", trainer)
    step._data_loader_iter_obj = iter(copy.deepcopy(batches))
    (schedule,) = [hook for hook in trainer._hooks if isinstance(hook, hooks.LRScheduler)]
    trainer.iter, trainer.max_iter = 0, max_iter
    found = []
    with EventStorage() as trainer.storage:
        schedule.before_train()
        for trainer.iter in range(len(batches)):
            trainer.run_step()
            schedule.after_step()
            latest = trainer.storage.latest()
            found.append({key: latest[key][0] for key in latest if "loss" in key})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COCO)
def test_the_first_iterations_agree(stand_in, tmp_path, name):
    cfg, lazy_cfg = cut_down(from_yaml(name)), cut_down_lazy(from_python(name))
    cfg.OUTPUT_DIR = lazy_cfg.train.output_dir = str(tmp_path)
    cfg.SEED = lazy_cfg.train.seed = 7
    # bf16 would hide a difference, warm-up hold back what the optimizer does.
    cfg.SOLVER.AMP.ENABLED = lazy_cfg.train.amp.enabled = False
    cfg.SOLVER.WARMUP_FACTOR = lazy_cfg.lr_multiplier.warmup_factor = 1.0
    state = str(tmp_path / "initial.pth")
    torch.save({"model": build_model(cfg).state_dict()}, state)
    cfg.MODEL.WEIGHTS = lazy_cfg.train.init_checkpoint = state

    yaml_way = Trainer(cfg)
    yaml_way.resume_or_load()
    batches = list(itertools.islice(yaml_way.data_loader, ITERATIONS))
    expected = losses(yaml_way, batches, cfg.SOLVER.MAX_ITER)
    found = losses(lazy.build_trainer(lazy_cfg), batches, lazy_cfg.train.max_iter)

    assert len(found) == len(expected) == ITERATIONS
    assert len({step["total_loss"] for step in expected}) == ITERATIONS
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_schedule_and_rates_are_those_of_the_yaml(name):
    cfg, lazy_cfg = from_yaml(name), from_python(name)
    assert lazy_cfg.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy_cfg.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert lazy_cfg.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy_cfg.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy_cfg.dataloader.train.dataset.names == cfg.DATASETS.TRAIN[0]
    assert lazy_cfg.dataloader.test.dataset.names == cfg.DATASETS.TEST[0]

    linear = torch.nn.Linear(1, 1)
    linear.backbone = None
    cfg = cfg.clone()
    cfg.defrost()
    multiplier = instantiate(lazy_cfg.lr_multiplier)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    schedule = build_lr_scheduler(cfg, optimizer)._multiplier
    edges = (0, 1, 100, 249, 250, 138888, 138889, 150463, 163889, 177546)
    for i in [edge for edge in edges if edge < cfg.SOLVER.MAX_ITER]:
        where = i / cfg.SOLVER.MAX_ITER
        assert multiplier(where) == pytest.approx(schedule(where), rel=1e-6)

    lazy_cfg.optimizer.params.model = linear
    optimizer, expected = instantiate(lazy_cfg.optimizer), build_optimizer(cfg, linear)
    # fused where there is a GPU, which the linear layer is not on
    own = {"weight_decay": cfg.SOLVER.WEIGHT_DECAY, "fused": optimizer.defaults["fused"]}
    assert optimizer.defaults == expected.defaults | own
    assert lazy_cfg.optimizer.params.layer_decay == cfg.SOLVER.LAYER_DECAY
    for a, b in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {k: a[k] for k in ("lr", "weight_decay")} == {
            k: b[k] for k in ("lr", "weight_decay")
        }


@pytest.mark.parametrize("name", BOTH)
def test_the_model_is_that_of_the_yaml(name):
    cfg, lazy_cfg = from_yaml(name), from_python(name)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.ROPE_VIT.NAME = "cpu", "rope_vit_reg4_demo16"
    lazy_cfg.model.backbone.net.name = "rope_vit_reg4_demo16"
    ours, theirs = instantiate(lazy_cfg.model), build_model(cfg)
    assert str(ours) == str(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours.input_format == theirs.input_format
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean)
    assert torch.equal(ours.pixel_std, theirs.pixel_std)


@pytest.mark.parametrize("name", COCO)
def test_the_augmentation_is_that_of_the_yaml(stand_in, name):
    cfg, lazy_cfg = cut_down(from_yaml(name)), cut_down_lazy(from_python(name))
    pairs = (
        (build_train_mapper(cfg), instantiate(lazy_cfg.dataloader.train.mapper)),
        (DatasetMapper(cfg, is_train=False), instantiate(lazy_cfg.dataloader.test.mapper)),
    )
    for ours, theirs in pairs:
        for record in DatasetCatalog.get(stand_in):
            for seed in range(5):
                found = []
                for mapper in (ours, theirs):
                    np.random.seed(seed)
                    found.append(mapper(copy.deepcopy(record)))
                a, b = found
                assert torch.equal(a["image"], b["image"])
                if "instances" in b:
                    assert torch.equal(
                        a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor
                    )

"""What a user registers or overrides works from the command line's own code."""

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from helpers import DEMO_CONFIG
from torch.utils.data import Sampler

from rope_vit_det.data.demo.dataset import register_demo_dataset
from rope_vit_det.data.loader import build_train_loader
from rope_vit_det.engine import main
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.solver import OPTIMIZERS

SMALL = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", "False"),
]


@pytest.fixture
def run(small_demo_dataset, monkeypatch, tmp_path):
    """Runs what tools/train_net.py runs, on tiny data; returns the checkpoint that it leaves."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    def forget():
        for split in ("train", "val"):
            for catalog in (DatasetCatalog, MetadataCatalog):
                catalog.pop(f"rope_vit_det_demo_{split}", None)

    forget()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_demo_dataset.parent))
    register_demo_dataset()

    def run(*settings, processes=1, **kwargs):
        options = ["--config-file", str(DEMO_CONFIG), "--num-gpus", str(processes), *SMALL]
        options += ["OUTPUT_DIR", str(tmp_path / "output"), *settings]
        main.run(argument_parser().parse_args(options), **kwargs)
        return torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)

    yield run
    forget()
    monkeypatch.undo()
    register_demo_dataset()


class TwoImages(Sampler):
    """A sampler that knows nothing of Detectron2's."""

    def __iter__(self):
        while True:
            yield from (1, 3)


class Scheduled(Trainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_an_lr_scheduler(run):
    checkpoint = run("SOLVER.LR_SCHEDULER_NAME", "Mine", trainer=Scheduled)
    groups = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {0.0006 * 0.5**2}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trainer_in_several_processes(run, processes):
    checkpoint = run(trainer=Scheduled, processes=processes)
    groups = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {0.0006 * 0.5**2}


def test_a_sampler_and_a_mapper(run):
    seen = []

    class MyMapper(DatasetMapper):
        def __call__(self, record):
            seen.append(record["image_id"])
            return super().__call__(record)

    class MyTrainer(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, mapper=MyMapper(cfg, True), sampler=TwoImages())

    run(
        "DATALOADER.SAMPLER_TRAIN", "TwoImages", "DATALOADER.ASPECT_RATIO_GROUPING", "False",
        trainer=MyTrainer,
    )  # fmt: skip
    # The rehearsal has a batch of its own.
    assert len(seen) == 6 and len(set(seen)) == 2 and seen[:2] == seen[2:4] == seen[4:]


def test_a_meta_architecture_and_a_head(run):
    class MyRCNN(GeneralizedRCNN):
        def forward(self, batch):
            losses = super().forward(batch)
            return {**losses, "loss_mine": sum(losses.values())} if self.training else losses

    class MyBoxHead(FastRCNNConvFCHead):
        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            self.mine = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.mine

    registered = {META_ARCH_REGISTRY: MyRCNN, ROI_BOX_HEAD_REGISTRY: MyBoxHead}
    for registry, each in registered.items():
        registry.register(each)
    try:
        names = ("MODEL.META_ARCHITECTURE", "MyRCNN", "MODEL.ROI_BOX_HEAD.NAME", "MyBoxHead")
        checkpoint = run(*names)
    finally:
        for registry, each in registered.items():
            registry._obj_map.pop(each.__name__)
    assert checkpoint["model"]["roi_heads.box_head.mine"] != 1


def test_an_optimizer(run):
    @OPTIMIZERS.register()
    def Mine(cfg, groups, model):  # noqa: N802
        return torch.optim.Adagrad(groups, lr=cfg.SOLVER.BASE_LR)

    try:
        checkpoint = run("SOLVER.OPTIMIZER", "Mine")
    finally:
        OPTIMIZERS._obj_map.pop("Mine")
    states = checkpoint["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert all("sum" in state for state in states)

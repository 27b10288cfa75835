"""A loss that is not finite: what is said, what is written down, and the same losses once more."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from helpers import DEMO_CONFIG

from rope_vit_det import add_rope_vit_config
from rope_vit_det.engine.divergence import replay
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import DivergedError, InputError


@pytest.fixture
def cfg(small_demo_dataset, tmp_path):
    json_file = small_demo_dataset / "annotations" / "instances_train.json"
    register_coco_instances("diverging", {}, str(json_file), str(small_demo_dataset / "train"))
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("diverging",), ()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 9, 2
    cfg.TEST.EVAL_PERIOD = 0
    cfg.OUTPUT_DIR = str(tmp_path)
    yield cfg
    DatasetCatalog.remove("diverging")
    MetadataCatalog.remove("diverging")


class _Breaker(HookBase):
    """Makes the class scores infinite before iteration 3."""

    def before_step(self):
        if self.trainer.iter == 3:
            with torch.no_grad():
                self.trainer.model.roi_heads.box_predictor.cls_score.weight.mul_(1e38).mul_(1e38)


def end_of_a_run(cfg, breaker):
    """The message of a run that a hook breaks, and the file that it names."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([breaker])
    with pytest.raises(DivergedError) as error:
        trainer.train()
    message, file = str(error.value), Path(cfg.OUTPUT_DIR, "diverged_0000003_0.pth")
    assert f"the last good checkpoint is {cfg.OUTPUT_DIR}/model_0000001.pth" in message
    assert message.endswith(f"--replay {file}")
    return message, file


def test_a_loss_that_is_not_finite_ends_the_run_and_can_be_replayed(cfg, tmp_path, capsys):
    message, file = end_of_a_run(cfg, _Breaker())
    assert "not finite at iteration 3: " in message and "loss_cls nan" in message
    told = dict(re.findall(r"(loss_\w+) ([\w.+-]+)", message))
    ids = {int(i) for i in re.search(r"for images ([\d, ]+)", message)[1].split(", ")}
    assert len(ids) == 2 and ids <= set(range(1, 9))

    model = Trainer.build_model(cfg)
    replay(model, file, precision=torch.float32)
    printed = capsys.readouterr().out
    assert "first output that is not finite: of roi_heads.box_predictor.cls_score" in printed
    again = dict(re.findall(r"^(loss_\w+) (\S+)$", printed, re.M))
    assert set(again) == set(told) and again["loss_cls"] == "nan"
    for name, value in told.items():
        assert float(again[name]) == pytest.approx(float(value), rel=1e-3, nan_ok=True)
    with pytest.raises(InputError, match="no batch of a diverged run"):
        replay(model, tmp_path / "model_0000001.pth", precision=torch.float32)


class _ProposalBreaker(HookBase):
    """Makes the RPN's boxes infinite before iteration 3, over which Detectron2 raises."""

    def before_step(self):
        if self.trainer.iter == 3:
            with torch.no_grad():
                self.trainer.model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(torch.nan)


def test_proposals_that_are_not_finite_end_it_as_well(cfg, capsys):
    message, file = end_of_a_run(cfg, _ProposalBreaker())
    assert "not finite at iteration 3: none (" in message and "Training has diverged" in message
    replay(Trainer.build_model(cfg), file, precision=torch.float32)
    printed = capsys.readouterr().out
    assert "weights that are not finite: 1, the first is proposal_generator." in printed
    assert "no losses: " in printed and "anchor_deltas" in printed.splitlines()[-1]

"""A run that was cut off and resumed is the run that was not: the same weights, to the bit."""

import contextlib
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase, hooks
from helpers import DEMO_CONFIG, differences, metrics_without_times
from stand_in import cut_down_lazy

from rope_vit_det import add_rope_vit_config
from rope_vit_det.checkpoint.resume import changed_settings
from rope_vit_det.engine.lazy import build_trainer
from rope_vit_det.engine.setup import check_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError


class _KilledError(Exception):
    pass


class _Killer(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise _KilledError


@pytest.fixture
def cfg(small_demo_dataset, tmp_path, monkeypatch):
    for split in ("train", "val"):
        json_file = small_demo_dataset / "annotations" / f"instances_{split}.json"
        folder = small_demo_dataset / split
        register_coco_instances(f"cut_off_{split}", {}, str(json_file), str(folder))
    # Detectron2 writes every 20 iterations.
    write = hooks.PeriodicWriter.__init__
    monkeypatch.setattr(
        hooks.PeriodicWriter, "__init__", lambda self, writers, period: write(self, writers, 2)
    )
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROPE_VIT.DROP_PATH_RATE = 0.3
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("cut_off_train",), ("cut_off_val",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64, 80, 96), 160
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WARMUP_ITERS = 2, 3
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 5, 2, 4
    yield cfg
    for split in ("train", "val"):
        DatasetCatalog.remove(f"cut_off_{split}")
        MetadataCatalog.remove(f"cut_off_{split}")


def _run(cfg, folder, *, resume=False, killed_at=None):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if killed_at is not None:
        trainer.register_hooks([_Killer(killed_at)])
        with pytest.raises(_KilledError):
            trainer.train()
    else:
        trainer.train()
    return trainer.start_iter


def _ema(cfg):
    cfg.SOLVER.EMA.ENABLED, cfg.SOLVER.EMA.DECAY = True, 0.5
    cfg.SOLVER.ACCUMULATE = 2


def _retinanet_without_grouping(cfg):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.DATASETS.TEST = ()


def _lora(cfg):
    cfg.MODEL.ROPE_VIT.LORA.RANK, cfg.MODEL.ROPE_VIT.LORA.DROPOUT = 4, 0.2
    _ema(cfg)


@pytest.mark.parametrize(
    "change",
    [
        _ema,
        pytest.param(_retinanet_without_grouping, marks=pytest.mark.slow),
        pytest.param(_lora, marks=pytest.mark.slow),
    ],
)
def test_a_run_cut_off_twice(cfg, tmp_path, change):
    change(cfg)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _run(cfg, whole)
    assert _run(cfg, cut, killed_at=2) == 0
    assert _run(cfg, cut, resume=True, killed_at=3) == 2
    assert _run(cfg, cut, resume=True) == 4  # with the evaluation after iteration 3 once more
    iterations = [row["iteration"] for row in metrics_without_times(whole)]
    assert set(iterations) >= {1, 3, 4} and len(set(iterations)) == len(iterations)
    assert differences(metrics_without_times(cut), metrics_without_times(whole)) == []
    for name in ("model_0000003.pth", "model_final.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, cut))
        assert differences(one, other) == []


def _rates(trainer):
    """Learning rate, weight decay and first moment's norm of each parameter, by its name."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    state = trainer.optimizer.state
    return {
        names[id(p)]: (
            group["lr"],
            group["weight_decay"],
            state[p]["exp_avg"].norm().item() if p in state else None,
        )
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


class _Look(HookBase):
    """Notes the rates of the first step, and ends the run."""

    def before_step(self):
        self.rates = _rates(self.trainer)
        raise _KilledError


def _cut_off(cfg, folder):
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.LAYER_DECAY = 0.7
    _run(cfg, folder, killed_at=2)  # with a checkpoint after iteration 1
    return str(folder)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_other_rates_decay_and_schedule_are_applied_and_said(cfg, tmp_path, caplog):
    cfg.OUTPUT_DIR = _cut_off(cfg, tmp_path / "cut")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 1e-5, 9, 2
    cfg.SOLVER.WEIGHT_DECAY = 0.0  # the groups of before are one then
    trainer = Trainer(cfg)
    with caplog.at_level("WARNING"):
        trainer.resume_or_load(resume=True)
    said = caplog.text
    assert "SOLVER.WEIGHT_DECAY (0.05 -> 0.0)" in said and "SOLVER.MAX_ITER (5 -> 9)" in said
    assert "SOLVER.BASE_LR" in said and "1e-05" in said and "OUTPUT_DIR" not in said
    moments = _rates(trainer)
    look = _Look()
    trainer.register_hooks([look])
    with pytest.raises(_KilledError):
        trainer.train()
    fresh = Trainer(cfg)
    for _ in range(trainer.start_iter):
        fresh.scheduler.step()
    wanted = _rates(fresh)
    assert look.rates.keys() == wanted.keys()
    for name, (rate, decay, moment) in look.rates.items():
        assert (rate, decay) == wanted[name][:2]
        assert moment == moments[name][2]
    saved = torch.load(tmp_path / "cut" / "model_0000001.pth", weights_only=True)["trainer"]
    saved = saved["_trainer"]
    indices = [i for group in saved["optimizer"]["param_groups"] for i in group["params"]]
    names = [name for group in saved["groups"] for name in group["names"]]
    for index, name in zip(indices, names, strict=True):
        state = saved["optimizer"]["state"].get(index)  # none of what no loss has reached
        norm = None if state is None else pytest.approx(state["exp_avg"].norm().item())
        assert moments[name][2] == norm


def test_what_a_resume_cannot_change_is_named(cfg, tmp_path):
    cfg.OUTPUT_DIR = _cut_off(cfg, tmp_path / "cut")

    def refused(match, *opts, early=True):
        changed = cfg.clone()
        changed.merge_from_list(list(opts))
        if early:
            with pytest.raises(InputError, match=match) as error:
                check_config(changed, resume=True)
            assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=match) as error:
            Trainer(changed).resume_or_load(resume=True)
        assert "MODEL.WEIGHTS " + cfg.OUTPUT_DIR in str(error.value) or "MAX_ITER" in match

    refused(r"LAYER_DECAY \(0.7 -> 0.8\).*start anew", "SOLVER.LAYER_DECAY", 0.8)
    refused("FREEZE_BLOCKS", "MODEL.ROPE_VIT.FREEZE_BLOCKS", 1)
    refused("MASK_ON", "MODEL.MASK_ON", False)
    refused(r"OPTIMIZER \('AdamW' -> 'SGD'\)", "SOLVER.OPTIMIZER", "SGD")
    refused("MAX_ITER is 1, and the run has done 2", "SOLVER.MAX_ITER", 1)
    # Not in any list: what the optimizer learns tells them.
    refused("parameters .*ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_BOX_HEAD.NUM_FC", 1, early=False)


@pytest.mark.parametrize(
    ("key", "old", "new", "rank", "weights_fit"),
    [
        ("MODEL.ROPE_VIT.NAME", "rope_vit_reg4_b14", "vit_reg4_b14", 0, False),
        ("MODEL.ROPE_VIT.LORA.RANK", 4, 8, 4, False),
        ("MODEL.ROPE_VIT.LORA.RANK", 0, 8, 0, True),
        ("MODEL.ROPE_VIT.LORA.ALPHA", 16.0, 64.0, 4, False),
        ("MODEL.ROPE_VIT.LORA.ALPHA", 16.0, 64.0, 0, True),
        ("MODEL.ROPE_VIT.FREEZE_BLOCKS", 0, 1, 4, True),
    ],
)
def test_a_start_from_weights_that_do_not_fit_is_not_advised(key, old, new, rank, weights_fit):
    before = {"MODEL.ROPE_VIT.LORA.RANK": rank, key: old}
    with pytest.raises(InputError, match="set it back, or start anew from ") as error:
        changed_settings("last.pth", {"settings": before}, before | {key: new})
    assert ("from its weights: MODEL.WEIGHTS last.pth" in str(error.value)) == weights_fit


@pytest.mark.slow
def test_a_lazy_run_cut_off(stand_in, tmp_path):
    configs = Path(__file__).parents[2] / "configs" / "COCO-InstanceSegmentation"

    def run(folder, *, resume=False, killed_at=None):
        name = "mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py"
        cfg = cut_down_lazy(LazyConfig.load(str(configs / name)))
        cfg.train.output_dir, cfg.train.seed = str(folder), 3
        cfg.train.max_iter, cfg.train.eval_period, cfg.train.log_period = 5, 0, 1
        cfg.train.checkpointer.period = 2
        cfg.train.amp.enabled = False
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        trainer = build_trainer(cfg, resume=resume)
        trainer._hooks = [h for h in trainer._hooks if not isinstance(h, hooks.EvalHook)]
        trainer.register_hooks([_Killer(killed_at)])
        with contextlib.suppress(_KilledError):
            trainer.train(trainer.start_iter, cfg.train.max_iter)
        return trainer.start_iter

    run(tmp_path / "whole")
    assert run(tmp_path / "cut", killed_at=2) == 0
    assert run(tmp_path / "cut", resume=True) == 2
    folders = (tmp_path / "whole", tmp_path / "cut")
    assert len(metrics_without_times(folders[0])) == 5
    assert differences(*map(metrics_without_times, folders)) == []
    saved = [torch.load(folder / "model_final.pth", weights_only=True) for folder in folders]
    assert differences(*saved) == []

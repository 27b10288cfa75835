"""The average of the weights: by its formula, in checkpoints, over a resume."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import hooks
from detectron2.modeling import build_model
from helpers import DEMO_CONFIG

from rope_vit_det import add_rope_vit_config
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.engine.hooks import EMA
from rope_vit_det.engine.trainer import Trainer


def test_the_formula():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        model(torch.randn(5, 3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter))
                expected[name] = 0.9 * expected[name] + 0.1 * parameter
        ema.after_step()
    for name, parameter in ema.model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-5, atol=1e-6), name
        assert not parameter.requires_grad
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)


@pytest.fixture
def cfg(small_demo_dataset, tmp_path):
    json_file = small_demo_dataset / "annotations" / "instances_train.json"
    register_coco_instances("averaged", {}, str(json_file), str(small_demo_dataset / "train"))
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("averaged",), ()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WARMUP_ITERS = 2, 0
    cfg.SOLVER.EMA.ENABLED, cfg.SOLVER.EMA.DECAY = True, 0.5
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    cfg.TEST.EVAL_PERIOD = 0
    cfg.OUTPUT_DIR = str(tmp_path)
    yield cfg
    DatasetCatalog.remove("averaged")
    MetadataCatalog.remove("averaged")


def _train(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def _distance(state, other):
    return max((state[k].float() - other[k].float()).abs().max().item() for k in other)


def test_checkpoints_hold_both_and_detectron2_loads_the_average(cfg, tmp_path):
    trainer = _train(cfg)
    trained = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    average = trainer.evaluated_model.state_dict()
    assert _distance(average, trained) > 1e-6
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert _distance(saved["model"], average) == 0
    assert _distance(saved["trained_model"], trained) == 0
    assert saved["classes"]["ids"] == [1, 2, 3, 4]

    plain = build_model(cfg)
    DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth"))
    assert _distance(plain.state_dict(), average) == 0

    # A new run starts at the average, in both models.
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    fresh = Trainer(cfg)
    fresh.resume_or_load(resume=False)
    assert _distance(fresh.model.state_dict(), average) == 0
    assert _distance(fresh.evaluated_model.state_dict(), average) == 0


def test_adapters_are_averaged_and_the_network_stays(cfg, tmp_path):
    cfg.MODEL.ROPE_VIT.LORA.RANK = 4
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    states = [start]
    note = hooks.CallbackHook(
        after_step=lambda t: states.append({k: v.clone() for k, v in t.model.state_dict().items()})
    )
    trainer.register_hooks([note])
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for name, tensor in start.items():
        if ".lora_" in name:
            average = 0.25 * tensor + 0.25 * states[1][name] + 0.5 * states[2][name]
            assert torch.allclose(saved["model"][name], average, rtol=1e-5, atol=1e-8), name
        elif name.startswith("backbone.net."):
            assert torch.equal(saved["model"][name], tensor), name
            assert torch.equal(saved["trained_model"][name], tensor), name
    moved = [name for name in start if name.endswith("lora_b") and saved["model"][name].any()]
    assert len(moved) == len([name for name in start if name.endswith("lora_b")]) > 0


def test_a_resumed_run_goes_on_with_both(cfg, tmp_path):
    whole = _train(cfg)
    trained, average = whole.model.state_dict(), whole.evaluated_model.state_dict()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    half = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert _distance(resumed.model.state_dict(), half["trained_model"]) == 0
    assert _distance(resumed.evaluated_model.state_dict(), half["model"]) == 0
    assert _distance(half["model"], half["trained_model"]) > 0
    resumed.train()
    assert _distance(resumed.evaluated_model.state_dict(), average) == 0
    assert _distance(resumed.model.state_dict(), trained) == 0


def test_a_run_that_goes_on_without_an_average_goes_on_from_what_learned(cfg, tmp_path):
    whole = _train(cfg)
    trained, average = whole.model.state_dict(), whole.evaluated_model.state_dict()
    assert _distance(trained, average) > 0
    cfg.SOLVER.EMA.ENABLED, cfg.SOLVER.MAX_ITER = False, 5
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert _distance(resumed.model.state_dict(), trained) == 0
    model = build_model(cfg)  # --eval-only --resume
    DetectorCheckpointer(model, str(tmp_path), whole=True).resume_or_load("", resume=True)
    assert _distance(model.state_dict(), average) == 0


def test_precise_batch_norm_is_of_the_model_that_is_evaluated(cfg, tmp_path):
    cfg.MODEL.FPN.NORM = "BN"
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    cfg.SOLVER.MAX_ITER = 1
    trainer = Trainer(cfg)
    layers = {
        name: layer
        for name, layer in trainer.evaluated_model.named_modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
    }
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: seen[name].append(inputs[0].transpose(0, 1).flatten(1))
        )
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert layers
    for name, layer in layers.items():
        assert len(seen[name]) == 2 and not layer.training
        variance, mean = torch.var_mean(torch.cat(seen[name], 1), 1, correction=0)
        for key, oracle in (("running_mean", mean), ("running_var", variance)):
            assert torch.equal(saved[f"{name}.{key}"], getattr(layer, key))
            assert torch.allclose(saved[f"{name}.{key}"], oracle, rtol=1e-3, atol=1e-5), name

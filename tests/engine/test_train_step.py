"""Training steps in each precision, accumulated or not, against the step written out."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import relative_difference

from rope_vit_det.engine.train_step import TrainStep, build_train_step
from rope_vit_det.errors import InputError
from rope_vit_det.layers import cpu as cpu_kernels
from rope_vit_det.solver import OPTIMIZERS, build_optimizer


class _Model(torch.nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x):
        y = self.dropout(self.linear(x))
        return {"loss_a": y.float().square().mean(), "loss_b": y.float().abs().mean()}


@pytest.fixture
def cfg(detector_cfg):
    detector_cfg.SEED = 3
    return detector_cfg


def _updates(step, model, steps=1):
    before = [p.detach().clone() for p in model.parameters()]
    with EventStorage() as step.storage:
        for step.iter in range(steps):
            step.run_step()
        logged = step.storage.latest()["total_loss"][0]
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)], logged


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("slow", [True, False], ids=["slow bf16", "fast bf16"])
def test_a_step_on_the_cpu(cfg, enabled, slow, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SLOW_BF16", slow)
    cfg.SOLVER.AMP.ENABLED = enabled
    model, x = _Model(), torch.randn(32, 64)
    oracle = copy.deepcopy(model)
    updates, logged = _updates(build_train_step(cfg, model, [x], _sgd(model)), model)

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled and not slow):
        losses = oracle(x)
    sum(losses.values()).backward()
    assert logged == pytest.approx(sum(losses.values()).item(), rel=1e-5)
    for (name, parameter), update in zip(oracle.named_parameters(), updates, strict=True):
        assert update.dtype == torch.float32
        # A gradient rounded otherwise (bf16 keeps 8 bits) would be off by some 4e-3.
        assert relative_difference(update, -0.1 * parameter.grad) < 1e-4, name


def test_an_accumulated_step_takes_the_mean_gradient_and_logs_the_mean_loss(cfg):
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.ACCUMULATE = 3
    model, data = _Model(), [torch.randn(8, 64) for _ in range(6)]
    oracle = copy.deepcopy(model)
    optimizer = _sgd(oracle)
    updates, logged = _updates(build_train_step(cfg, model, data, _sgd(model)), model, steps=2)

    before = [p.detach().clone() for p in oracle.parameters()]
    for micro_batches in (data[:3], data[3:]):
        optimizer.zero_grad()
        loss = torch.stack([sum(oracle(x).values()) for x in micro_batches]).mean()
        loss.backward()
        optimizer.step()
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    for old, new, update in zip(before, oracle.parameters(), updates, strict=True):
        assert relative_difference(update, new.detach() - old) < 1e-4


def test_random_state_comes_from_seed_iteration_and_micro_batch_alone(cfg):
    x = torch.ones(16, 64)

    def losses(accumulate, noise, seed=3):
        cfg.SEED, cfg.SOLVER.ACCUMULATE = seed, accumulate
        torch.manual_seed(0)
        model = _Model(dropout=0.5)
        step = build_train_step(cfg, model, [x] * 6, torch.optim.SGD(model.parameters(), lr=0.0))
        seen = []
        forward = step.forward
        step.forward = lambda *args: seen.append(forward(*args)) or seen[-1]
        with EventStorage() as step.storage:
            for step.iter in range(2):
                torch.manual_seed(noise)
                step.run_step()
        return [round(loss["loss_a"].item(), 6) for loss in seen]

    first = losses(2, noise=1)
    assert first == losses(2, noise=2)
    assert len(set(first)) == 4
    assert [first[0], first[2]] == losses(1, noise=1)
    assert not set(first) & set(losses(2, noise=1, seed=4))


def test_clipping_bounds_the_norm_of_the_averaged_gradient(cfg):
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 0.5
    cfg.SOLVER.ACCUMULATE = 2
    model = _Model()
    model.backbone = torch.nn.Identity()
    data = [torch.randn(8, 64) * 20, -torch.randn(8, 64) * 20]
    oracle = copy.deepcopy(model)
    optimizer = build_optimizer(cfg, model)
    gradients = []
    optimizer.register_step_post_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in model.parameters())
    )
    _updates(build_train_step(cfg, model, data, optimizer), model)

    torch.stack([sum(oracle(x).values()) for x in data]).mean().backward()
    whole = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
    assert whole > 1  # there was something to clip
    for found, parameter in zip(gradients, oracle.parameters(), strict=True):
        assert relative_difference(found, parameter.grad) < 1e-4


def test_a_model_without_losses_is_refused(cfg):
    model = _Model()
    model.forward = lambda x: {}
    step = build_train_step(cfg, model, [torch.zeros(1, 64)], build_optimizer(cfg, model))
    step.iter = 0
    with pytest.raises(InputError, match="no losses"):
        step.run_step()


def _adamw(model, *, fused):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)


@pytest.mark.parametrize("clip_type", ["value", "norm", "full_model"])
def test_a_fused_optimizer_clips_gradients_without_float16s_scale(cfg, clip_type):
    clip, most = cfg.SOLVER.CLIP_GRADIENTS, 0.02
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, clip_type, most
    model, x = _Model(), torch.randn(8, 64) * 4
    oracle = copy.deepcopy(model)
    model.backbone = torch.nn.Identity()

    @OPTIMIZERS.register()
    def Fused(cfg, groups, model):  # noqa: N802
        return _adamw(model, fused=True)

    try:
        cfg.SOLVER.OPTIMIZER = "Fused"
        optimizer = build_optimizer(cfg, model)
    finally:
        OPTIMIZERS._obj_map.pop("Fused")
    gradients = []
    optimizer.register_step_post_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in model.parameters())
    )
    step = TrainStep(model, [x], optimizer, seed=3, precision=torch.float16)
    _updates(step, model)

    sum(oracle(x).values()).backward()
    parameters = list(oracle.parameters())
    assert all(p.grad.abs().max() > most for p in parameters)  # there was something to clip
    if clip_type == "value":
        torch.nn.utils.clip_grad_value_(parameters, most)
    for each in parameters if clip_type == "norm" else [parameters]:
        if clip_type != "value":
            torch.nn.utils.clip_grad_norm_(each, most)
    for found, parameter in zip(gradients, parameters, strict=True):
        assert relative_difference(found, parameter.grad) < 0.03  # float16


def test_a_fused_optimizer_leaves_out_a_step_that_overflows_float16(cfg):
    model, data = _Model(), [torch.randn(8, 64), torch.randn(8, 64)]
    step = TrainStep(model, data, _adamw(model, fused=True), seed=3, precision=torch.float16)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    updates, _ = _updates(step, model)
    assert not any(update.any() for update in updates) and step.grad_scaler.get_scale() == 2.0**39
    assert all(state["step"] == 0 for state in step.optimizer.state.values())


@pytest.mark.parametrize("older", [False, True], ids=["groups", "no groups"])
@pytest.mark.parametrize("fused", [None, True], ids=["from fused", "to fused"])
def test_checkpoints_of_fused_and_plain_optimizers_resume_as_each_other(cfg, fused, older):
    data = [torch.randn(8, 64) for _ in range(4)]
    torch.manual_seed(0)
    model = _Model()
    before = TrainStep(model, data, _adamw(model, fused=None if fused else True), seed=3)
    _updates(before, model, steps=2)
    saved = copy.deepcopy(before.state_dict())
    if older:
        del saved["groups"]
    other = copy.deepcopy(model)
    resumed = TrainStep(other, data[2:], _adamw(other, fused=fused), seed=3)
    resumed.load_state_dict(saved)
    (group,) = resumed.optimizer.param_groups
    assert group["fused"] is fused and group["foreach"] is None
    _updates(before, model, steps=2)
    _updates(resumed, other, steps=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert relative_difference(a, b) < 1e-6
    steps = {state["step"].item() for state in resumed.optimizer.state.values()}
    assert steps == {4.0}

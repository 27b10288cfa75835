"""One training step in each precision, against the step written out."""

import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from rope_vit_det.engine.train_step import AutocastTrainer, build_train_step


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        y = self.linear(x)
        return {"loss_a": y.float().square().mean(), "loss_b": y.float().abs().mean()}


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_on_the_cpu(detector_cfg, enabled):
    detector_cfg.SOLVER.AMP.ENABLED = enabled
    model, x = _Model(), torch.randn(32, 64)
    oracle = copy.deepcopy(model)
    step = build_train_step(detector_cfg, model, [x], torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(step) is (AutocastTrainer if enabled else SimpleTrainer)
    with EventStorage() as step.storage:
        step.run_step()
        assert step.storage.latest()["total_loss"][0] > 0

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        losses = oracle(x)
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter -= 0.1 * parameter.grad
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)

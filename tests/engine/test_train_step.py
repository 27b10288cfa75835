"""One training step in each precision, against the step written out."""

import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from helpers import relative_difference

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
    for (name, before), after in zip(oracle.named_parameters(), model.parameters(), strict=True):
        assert after.dtype == torch.float32
        # A gradient rounded otherwise (bf16 keeps 8 bits) would be off by some 4e-3.
        assert relative_difference(before - after, 0.1 * before.grad) < 1e-4, name

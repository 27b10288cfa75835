"""One training step in mixed precision."""

import time

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn


class AutocastTrainer(SimpleTrainer):
    """Detectron2's :class:`SimpleTrainer` with the forward pass under bf16 autocast, on any device.

    bf16 has the range of float32, so it needs no gradient scaler; Detectron2's
    :class:`AMPTrainer` insists on one, and on CUDA.
    """

    def run_step(self) -> None:
        assert self.model.training, "[AutocastTrainer] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(next(self.model.parameters()).device.type, dtype=torch.bfloat16):
            loss_dict = self.model(data)
        self.optimizer.zero_grad()
        sum(loss_dict.values()).backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.optimizer.step()


def build_train_step(
    cfg: CfgNode, model: nn.Module, data_loader: object, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """The step that SOLVER.AMP asks for: float32, bf16 or (on a GPU) float16 with a scaler."""
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer)
    if cfg.SOLVER.AMP.DTYPE == "bfloat16":
        return AutocastTrainer(model, data_loader, optimizer)
    return AMPTrainer(model, data_loader, optimizer, precision=torch.float16)

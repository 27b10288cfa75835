"""The best checkpoint, and the end of a run that gets no better, on made-up metrics."""

import pytest
import torch
from detectron2.checkpoint import Checkpointer
from detectron2.engine import TrainerBase, hooks

from rope_vit_det.engine.hooks import BestCheckpointer, StopTraining


class _Run(TrainerBase):
    """Trains a single weight, which counts the steps; evaluates every second one."""

    def __init__(self, metrics, folder, patience, metric="bbox/AP"):
        super().__init__()
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.checkpointer = Checkpointer(self.model, str(folder))
        values = iter(metrics)
        evaluate = hooks.EvalHook(2, lambda: {"bbox": {"AP": next(values)}})
        best = BestCheckpointer(2, self.checkpointer, metric, patience)
        self.register_hooks([evaluate, best])

    def run_step(self):
        with torch.no_grad():
            self.model.weight += 1


def _steps(path):
    return int(torch.load(path, weights_only=True)["model"]["weight"])


def test_the_best_is_kept(tmp_path):
    _Run([10.0, 30.0, 20.0, 29.0], tmp_path, patience=0).train(0, 8)
    assert _steps(tmp_path / "model_best.pth") == 4


def test_the_last_evaluation_counts_too(tmp_path):
    _Run([10.0, 30.0, 20.0, 31.0], tmp_path, patience=0).train(0, 8)
    assert _steps(tmp_path / "model_best.pth") == 8


def test_a_run_that_gets_no_better_ends(tmp_path):
    run = _Run([10.0, 30.0, 20.0, float("nan"), 40.0], tmp_path, patience=2)
    with pytest.raises(StopTraining, match="2 evaluations without a better bbox/AP than 30"):
        run.train(0, 10)
    assert _steps(tmp_path / "model_best.pth") == 4
    assert _steps(tmp_path / "model_final.pth") == 8


def test_patience_starts_anew_with_every_better_one(tmp_path):
    _Run([10.0, 9.0, 11.0, 10.0, 12.0], tmp_path, patience=2).train(0, 10)
    assert _steps(tmp_path / "model_best.pth") == 10


def test_a_resumed_run_knows_the_best(tmp_path):
    first = _Run([30.0, 20.0], tmp_path, patience=3)
    first.train(0, 4)
    again = _Run([25.0, 26.0], tmp_path, patience=3)
    again.load_state_dict(first.state_dict())
    with pytest.raises(StopTraining, match="than 30"):
        again.train(4, 10)
    assert _steps(tmp_path / "model_best.pth") == 2


def test_before_something_is_found_none_is_worse(tmp_path):
    nan = float("nan")
    _Run([nan, nan, 1.0, nan, 2.0], tmp_path, patience=2).train(0, 10)
    assert _steps(tmp_path / "model_best.pth") == 10


def test_an_evaluation_that_lacks_the_metric_ends_no_run(tmp_path, caplog):
    # Detectron2's COCOEvaluator leaves the masks out where nothing is found.
    _Run([1.0, 2.0], tmp_path, patience=1, metric="segm/AP").train(0, 4)
    assert "segm/AP does not seem to be computed" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()

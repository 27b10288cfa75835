"""SOLVER.ACCUMULATE 0: which number it stands for, and that nothing else moves."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer
from stand_in import cut_down

from rope_vit_det.config.keys import with_settings
from rope_vit_det.engine import micro_batches, trainer
from rope_vit_det.engine.micro_batches import (
    check_micro_batches,
    fewest_that_fit,
    settle_micro_batches,
    step_that_fits,
    with_micro_batches,
)
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.train_step import TrainStep
from rope_vit_det.errors import InputError

FOLDER = Path(__file__).parents[2] / "configs" / "COCO-InstanceSegmentation"


def _recipe(*opts):
    file = str(FOLDER / "mask_rcnn_rope_vit_reg4_b14_1x_1gpu.yaml")
    return load_config(Namespace(config_file=[file], opts=list(opts), num_gpus=1))


def _args(**changed):
    usual = dict(num_gpus=1, num_machines=1, resume=False, eval_only=False)
    return Namespace(**usual | changed)


@pytest.mark.parametrize(
    ("images", "processes", "most", "number"),
    [(16, 1, 16, 1), (16, 1, 9, 2), (16, 1, 2, 8), (16, 1, 1, 16), (16, 4, 3, 2), (6, 1, 2, 3)],
)
def test_the_fewest_that_fit(images, processes, most, number):
    asked = []
    found = fewest_that_fit(images, processes, lambda n: asked.append(n) or n <= most)
    assert found == number
    assert asked == sorted(asked, reverse=True) and asked[-1] * number * processes == images


def test_not_even_one_image_fits():
    with pytest.raises(InputError, match="ACTIVATION_CHECKPOINT True"):
        fewest_that_fit(4, 1, lambda images: False)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    cfg = _recipe()
    check_micro_batches(cfg, 8)
    with pytest.raises(InputError, match=r"IMS_PER_BATCH 16, the images of a step, .* by 3 "):
        check_micro_batches(cfg, 3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [1, 2, 8])
def test_batch_rate_and_schedule_do_not_move(number, processes):
    cfg = _recipe()
    settled = with_micro_batches(cfg, number, processes)
    scaled = DefaultTrainer.auto_scale_workers(settled, processes * number)
    for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS"):
        assert scaled.SOLVER[key] == cfg.SOLVER[key]
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (16, 90000)


def test_on_the_cpu_it_is_the_size_that_the_recipe_is_made_for(tmp_path):
    cfg = _recipe("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path))
    settled = settle_micro_batches(cfg, _args(), trainer.Trainer)
    assert (settled.SOLVER.ACCUMULATE, settled.SOLVER.REFERENCE_WORLD_SIZE) == (8, 8)
    settled = settle_micro_batches(cfg, _args(num_gpus=2), trainer.Trainer)
    assert (settled.SOLVER.ACCUMULATE, settled.SOLVER.REFERENCE_WORLD_SIZE) == (4, 8)
    explicit = with_settings(cfg, {"SOLVER.ACCUMULATE": 2})
    assert settle_micro_batches(explicit, _args(), trainer.Trainer) is explicit


def test_a_gpu_is_measured_once_in_a_run(tmp_path, monkeypatch):
    cfg = with_settings(_recipe("OUTPUT_DIR", str(tmp_path)), {"MODEL.DEVICE": "cuda"})
    calls = []
    monkeypatch.setattr(micro_batches, "in_own_process", lambda *_: calls.append(1) or 2)
    # the run has not begun
    settled = settle_micro_batches(cfg, _args(resume=True), trainer.Trainer)
    assert settled.SOLVER.ACCUMULATE == 2 and len(calls) == 1
    (tmp_path / "config.yaml").write_text(settled.dump())
    resumed = settle_micro_batches(cfg, _args(resume=True), trainer.Trainer)
    assert resumed == settled and len(calls) == 1
    settle_micro_batches(cfg, _args(eval_only=True), trainer.Trainer)
    assert len(calls) == 1


@pytest.mark.parametrize("lsj", [False, True])
def test_the_measured_step_has_the_largest_padded_images(stand_in, monkeypatch, lsj):
    cfg = cut_down(_recipe("INPUT.LSJ.ENABLED", str(lsj)))
    seen = []

    def forward(self, data, micro_batch):
        padded = self.model.preprocess_image(data).tensor.shape
        seen.append((len(data), sorted(padded[-2:])))
        if len(data) > 1:
            raise torch.OutOfMemoryError
        return own(self, data, micro_batch)

    own = TrainStep.forward
    monkeypatch.setattr(TrainStep, "forward", forward)
    fits = step_that_fits(cfg, 1, trainer.Trainer)
    assert not fits(2) and fits(1)
    size = [128, 128] if lsj else [128, 192]
    assert seen == [(2, size), (1, size), (1, size)]

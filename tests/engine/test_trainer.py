"""The trainer's own parts: test-time augmentation, and a training that learns."""

import signal

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import GeneralizedRCNNWithTTA

from rope_vit_det import add_rope_vit_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError, StoppedError
from rope_vit_det.evaluation.evaluators import build_evaluator


@pytest.fixture
def cfg(small_demo_dataset, tmp_path):
    for split in ("train", "val"):
        json_file = small_demo_dataset / "annotations" / f"instances_{split}.json"
        register_coco_instances(f"few_{split}", {}, str(json_file), str(small_demo_dataset / split))
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    from helpers import DEMO_CONFIG

    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("few_train",), ("few_val",)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.EVAL_PERIOD = 0
    yield cfg
    for split in ("train", "val"):
        DatasetCatalog.remove(f"few_{split}")
        MetadataCatalog.remove(f"few_{split}")


class _Mine(Trainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):  # as DefaultTrainer has it
        return build_evaluator(cfg, dataset_name)


def test_augmented_evaluation_runs_at_the_end_where_asked_for(cfg, tmp_path):
    cfg.SOLVER.MAX_ITER = 1
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES = (160, 250)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 50, 50], ["segm_TTA", "AP", 50, 50]]
    trainer = _Mine(cfg)
    trainer.resume_or_load()
    trainer.train()
    assert set(trainer.storage.latest()) >= {"bbox/AP", "segm/AP", "bbox_TTA/AP", "segm_TTA/AP"}
    assert (tmp_path / "inference_TTA" / "inference" / "coco_instances_results.json").exists()


def test_a_signal_stops_augmented_evaluation_at_the_next_image(cfg, tmp_path, monkeypatch):
    cfg.SOLVER.MAX_ITER = 1
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES = (64,)
    asked = []

    def look(tta, images):
        if not asked:
            signal.raise_signal(signal.SIGTERM)
        asked.extend(images)
        return looks(tta, images)

    looks = GeneralizedRCNNWithTTA.__call__
    monkeypatch.setattr(GeneralizedRCNNWithTTA, "__call__", look)
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    with pytest.raises(StoppedError, match=r"SIGTERM after iteration 0; .*resume"):
        trainer.train()
    assert len(asked) == 1


class _WithTheirLoader(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, num_workers=0)


@pytest.mark.parametrize("grouped", [True, False])
def test_detectron2s_loader_is_told_of_and_has_no_micro_batches(cfg, caplog, grouped):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.SOLVER.IMS_PER_BATCH = grouped, 4
    trainer = _WithTheirLoader(cfg)
    assert "build_train_loader(...): resumed, its data starts over" in caplog.text
    assert len(next(iter(trainer.data_loader))) == 4
    cfg.SOLVER.ACCUMULATE = 2
    line = r"ACCUMULATE is 2, .* batches of 4 images where a micro-batch has 2: return rope_vit_det"
    with pytest.raises(InputError, match=line):
        _WithTheirLoader(cfg)
    caplog.clear()
    assert len(next(iter(Trainer(cfg).data_loader))) == 2
    assert "starts over" not in caplog.text


@pytest.mark.slow
def test_training_learns(cfg):
    cfg.SOLVER.MAX_ITER = 60
    cfg.SOLVER.WARMUP_ITERS = 10
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])

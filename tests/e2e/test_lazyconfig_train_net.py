"""Whole runs of tools/lazyconfig_train_net.py, in fresh processes, on a few images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import differences, metrics_without_times

from rope_vit_det.checkpoint.checkpointer import read_classes

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py"
# A small network under the recipe's heads, on the demo's dataset; pixels as in the weights file.
CONFIG = """
from detectron2.config import LazyConfig

parts = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load({recipe!r}, parts)
model.backbone.net.name = "rope_vit_reg1_t16"
model.pixel_mean, model.pixel_std = [127.5, 114.75, 102.0], [63.75, 61.2, 58.65]
model.roi_heads.num_classes = 4
model.roi_heads.batch_size_per_image = 8
model.roi_heads.box_predictor.test_score_thresh = 0.0  # random heads find little
model.proposal_generator.post_nms_topk = (50, 10)
dataloader.train.dataset.names = "rope_vit_det_demo_train"
dataloader.test.dataset.names = "rope_vit_det_demo_val"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
resize, crop, flip = dataloader.train.mapper.augmentations
resize.target_height = resize.target_width = 128
crop.crop_size = (128, 128)
(test_resize,) = dataloader.test.mapper.augmentations
test_resize.short_edge_length = test_resize.max_size = 128
train.max_iter, train.eval_period, train.checkpointer.period = 2, 0, 2
train.seed, train.output_dir = 7, "out"
"""


@pytest.fixture
def run(small_demo_dataset, tmp_path):
    """Runs the tool in a folder of its own; returns its exit status and what it printed."""
    (tmp_path / "mine.py").write_text(CONFIG.format(recipe=str(RECIPE)))
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
        "PYTHONPATH": str(ROOT),
    }

    def run(*arguments):
        command = ["tools/lazyconfig_train_net.py", "--config-file", str(tmp_path / "mine.py")]
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", ROOT / command[0], *command[1:], *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        return answer.returncode, answer.stdout + answer.stderr

    return run


@pytest.mark.slow
def test_a_run_from_birders_weights_to_its_evaluation(
    run, birder_file, small_demo_dataset, tmp_path
):
    path, _ = birder_file("rope_vit_reg1_t16")
    status, log = run(f"train.init_checkpoint=birder:{path}")
    assert status == 0, log[-4000:]
    assert "Learning rates, before warm-up" in log and "backbone.net.encoder.block.0 " in log
    assert re.search(r"segm.*\n.*AP,AP50", log)
    out = tmp_path / "out"
    classes = read_classes(str(out / "model_final.pth"))
    annotations = small_demo_dataset / "annotations" / "instances_train.json"
    coco = json.loads(annotations.read_text())
    assert classes["ids"] == sorted(each["id"] for each in coco["categories"])
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    (found,) = (row for row in metrics if "bbox/AP" in row)

    status, log = run("--eval-only", f"train.init_checkpoint={out / 'model_final.pth'}")
    assert status == 0, log[-4000:]
    table = re.findall(r"copypaste: ([\d.,na-]+)$", log, re.MULTILINE)
    assert float(table[0].split(",")[0]) == pytest.approx(found["bbox/AP"], abs=1e-3, nan_ok=True)

    status, log = run("--resume", "train.max_iter=3", f"train.init_checkpoint=birder:{path}")
    assert status == 0, log[-4000:]
    assert "Starting training from iteration 2" in log
    checkpoint = torch.load(out / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 2 and checkpoint["classes"] == classes
    steps = {int(state["step"]) for state in checkpoint["trainer"]["optimizer"]["state"].values()}
    assert steps == {3}


@pytest.mark.slow
def test_a_wrong_number_of_classes_is_one_line(run):
    status, log = run("train.init_checkpoint=", "model.roi_heads.num_classes=80")
    assert status == 2 and "Traceback" not in log
    assert "set model.roi_heads.num_classes 4" in log.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_is_to_the_bit_the_one_without_its_rehearsal(run, tmp_path):
    folders = [tmp_path / name for name in ("with", "without")]
    for folder, flags in zip(folders, ((), ("--no-rehearsal",)), strict=True):
        status, log = run(*flags, "train.init_checkpoint=", f"train.output_dir={folder}")
        assert status == 0, log[-4000:]
    assert differences(*map(metrics_without_times, folders)) == []
    for name in ("model_0000001.pth", "model_final.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in folders)
        assert differences(one, other) == []

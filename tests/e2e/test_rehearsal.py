"""A run is to the bit the one without its rehearsal; what costs a training today ends before it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import differences, metrics_without_times

ROOT = Path(__file__).parents[2]
DEMO = ("--config-file", ROOT / "configs" / "demo.yaml")
TINY = (
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.MAX_ITER", "3",
    "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "0", "SEED", "7",
    "SOLVER.AMP.ENABLED", "False",
)  # fmt: skip
RETINANET = (
    "--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "--config-file", ROOT / "configs" / "backbones" / "rope_vit_reg4_b14.yaml",
    "MODEL.WEIGHTS", "", "MODEL.ROPE_VIT.NAME", "rope_vit_reg4_demo16",
    "MODEL.RETINANET.NUM_CLASSES", "4", "MODEL.RETINANET.NORM", "BN",
    "DATASETS.TRAIN", "('rope_vit_det_demo_train',)", "DATASETS.TEST", "('rope_vit_det_demo_val',)",
    "SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.0002", "MODEL.FPN.OUT_CHANNELS", "32",
    "SOLVER.STEPS", "(2,)", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.EMA.ENABLED", "True", "SOLVER.ACCUMULATE", "2",
)  # fmt: skip


@pytest.fixture
def run(small_demo_dataset, tmp_path):
    environment = os.environ | {"DETECTRON2_DATASETS": str(small_demo_dataset.parent)}

    def run(*arguments, status=0):
        command = [sys.executable, ROOT / "tools" / "train_net.py", *map(str, arguments)]
        answer = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert answer.returncode == status, answer.stdout[-2000:] + answer.stderr[-4000:]
        return answer.stderr

    return run


def _assert_same(one, other):
    assert differences(metrics_without_times(one), metrics_without_times(other)) == []
    for name in ("model_0000001.pth", "model_final.pth"):
        first, second = (torch.load(each / name, weights_only=True) for each in (one, other))
        assert differences(first, second) == []


@pytest.mark.parametrize(
    "config", [(*DEMO, *TINY), (*RETINANET, *TINY), (*DEMO, "--num-gpus", "2", *TINY)]
)
@pytest.mark.slow
def test_a_run_is_the_one_without_its_rehearsal(run, tmp_path, config):
    run(*config, "OUTPUT_DIR", "with")
    run("--no-rehearsal", *config, "OUTPUT_DIR", "without")
    _assert_same(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_so_is_one_that_is_resumed(run, tmp_path):
    for name, flags in (("with", ()), ("without", ("--no-rehearsal",))):
        run(*flags, *DEMO, *TINY, "OUTPUT_DIR", name)
        folder = tmp_path / name
        (folder / "model_final.pth").unlink()
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        run("--resume", *flags, *DEMO, *TINY, "OUTPUT_DIR", name)
    _assert_same(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_a_metric_that_no_evaluation_gives(run, tmp_path):
    metric = ("TEST.EVAL_PERIOD", "2", "SOLVER.BEST_METRIC", "keypoints/AP")
    line = run(*DEMO, *TINY, *metric, "OUTPUT_DIR", "out", status=2)
    assert "SOLVER.BEST_METRIC names 'keypoints/AP'; the evaluation gives: " in line
    assert "bbox/AP" in line and "Traceback" not in line
    assert not list((tmp_path / "out").glob("model_*.pth"))


@pytest.mark.slow
def test_an_object_that_its_own_evaluator_does_not_find(run, small_demo_dataset, tmp_path):
    file = small_demo_dataset / "annotations" / "instances_val.json"
    coco = json.loads(file.read_text())
    thin = next(each for each in coco["annotations"] if not each["iscrowd"])
    thin["bbox"][2] = 0
    (tmp_path / "thin.json").write_text(json.dumps(coco))
    train = small_demo_dataset / "annotations" / "instances_train.json"
    data = (
        "--train-json", train, "--train-images", small_demo_dataset / "train",
        "--val-json", "thin.json", "--val-images", small_demo_dataset / "val",
    )  # fmt: skip
    run(*DEMO, *data, *TINY, "OUTPUT_DIR", "out")
    faults = (tmp_path / "out" / "dataset_faults.txt").read_text()
    assert f"annotation {thin['id']}" in faults

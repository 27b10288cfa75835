"""Whole runs through the command lines, in fresh processes, on a few images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rope_vit_det import create_model
from rope_vit_det.weights import write_weights_file
from rope_vit_det.weights.info import WeightsInfo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(small_demo_dataset, tmp_path_factory):
    """Runs a tool in a folder of its own; returns what it printed."""
    folder = tmp_path_factory.mktemp("run")
    environment = os.environ | {"DETECTRON2_DATASETS": str(small_demo_dataset.parent)}

    def run(tool, *arguments, status=0):
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", ROOT / "tools" / tool, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
        )
        assert answer.returncode == status, answer.stdout[-2000:] + answer.stderr[-4000:]
        return answer.stdout + answer.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def config():
    return ("--config-file", ROOT / "configs" / "demo.yaml")


SHORT = ("SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "0")


@pytest.fixture(scope="module")
def trained(run, config):
    log = run("train_net.py", *config, *SHORT, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", "out")
    return run.folder / "out", log


def test_training_leaves_what_detectron2_leaves(trained):
    out, log = trained
    assert "No GPU here" in log
    assert "eta:" in log
    assert (out / "model_final.pth").exists()
    assert (out / "config.yaml").exists()
    assert list(out.glob("events.out.tfevents.*"))
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in row and "segm/AP" in row for row in metrics)
    losses = [row["total_loss"] for row in metrics if "total_loss" in row]
    assert losses and np.isfinite(losses).all()
    weights = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_a_run_tells_where_everything_lies_and_records_how_it_was_started(trained):
    out, log = trained
    assert f"In {out}:" in log
    (row,) = [json.loads(line) for line in (out / "runs.json").read_text().splitlines()]
    assert row["config"] == (out / "config.yaml").read_text()
    assert row["seed"] == 7 and "SEED: 7" in row["config"]
    assert row["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "SOLVER.MAX_ITER" in row["command"]
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (row["git_revision"] or "").removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.slow
def test_a_second_training_in_the_same_folder_is_refused(run, config, trained):
    out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    line = run("train_net.py", *config, "OUTPUT_DIR", "out", status=2).splitlines()[-1]
    assert line.startswith("error: out holds") and "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_evaluation_alone_finds_what_the_training_run_found(run, config, trained):
    out, _ = trained
    results = out / "inference" / "coco_instances_results.json"
    there = json.loads(results.read_text())
    results.unlink()
    trained_by = (out / "config.yaml").read_text()
    # as a measured SOLVER.ACCUMULATE, which an evaluation does not measure
    options = ("MODEL.WEIGHTS", out / "model_final.pth", "SOLVER.ACCUMULATE", "2")
    run("train_net.py", *config, "--eval-only", *options, "OUTPUT_DIR", "out")
    assert (out / "config.yaml").read_text() == trained_by and "ACCUMULATE: 1" in trained_by
    row = json.loads((out / "runs.json").read_text().splitlines()[-1])
    assert "ACCUMULATE: 2" in row["config"] and row["eval_only"]
    again = json.loads(results.read_text())
    assert len(again) == len(there) > 0
    for a, b in zip(again, there, strict=True):
        assert a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_stopped(run, config, trained):
    out, _ = trained
    more = (*SHORT, "SOLVER.MAX_ITER", "6", "OUTPUT_DIR", "out")
    log = run("train_net.py", *config, "--resume", *more)
    assert "Starting training from iteration 4" in log
    checkpoint = torch.load(out / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 5
    state = checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    assert {int(s["step"]) for s in state.values()} == {6}


def test_the_demo_runs_after_an_earlier_run(run):
    out = run.folder / "output" / "demo"
    out.mkdir(parents=True)
    (out / "model_final.pth").write_text("of the earlier run")
    log = run("demo.py", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0")
    for name in ("model_final.pth", "metrics.json", "curves.png", "predictions.png", "report.html"):
        assert (out / name).stat().st_size > 0
        assert name in log
    assert "occluded" in log and "| AP" in log
    earlier = run.folder / "output" / "demo.previous" / "model_final.pth"
    assert earlier.read_text() == "of the earlier run"


@pytest.mark.slow
def test_a_frozen_network_in_bf16_trains_goes_on_predicts_and_is_exported(run, config):
    weights = run.folder / "rope_vit_reg4_demo16_mine.safetensors"
    network = create_model("rope_vit_reg4_demo16")
    pixels = ((0.5,) * 3, (0.25,) * 3)
    info = WeightsInfo("rope_vit_reg4_demo16", None, 0, {}, (224, 224), *pixels)
    write_weights_file(weights, network.state_dict(), info)
    opts = ("MODEL.ROPE_VIT.DTYPE", "bfloat16", "MODEL.ROPE_VIT.FREEZE_BLOCKS", "-1")
    opts += ("MODEL.WEIGHTS", weights, "MODEL.ROPE_VIT.CHECK_WEIGHTS", "False")
    opts += ("SOLVER.EMA.ENABLED", "True", "OUTPUT_DIR", "bf16")
    run("train_net.py", *config, *SHORT, *opts, "SOLVER.MAX_ITER", "4")
    run("train_net.py", *config, "--resume", *SHORT, *opts, "SOLVER.MAX_ITER", "6")
    model = torch.load(run.folder / "bf16" / "model_final.pth")["model"]
    for key, tensor in network.state_dict().items():
        if f"backbone.net.{key}" in model:
            assert torch.equal(model[f"backbone.net.{key}"], tensor.bfloat16()), key
    heads = [t.dtype for k, t in model.items() if not k.startswith("backbone.net.")]
    assert set(heads) == {torch.float32}
    run("train_net.py", *config, "--eval-only", *opts, "MODEL.WEIGHTS", "bf16/model_final.pth")
    assert "p3" in run("export_model.py", "bf16", "backbone.pt2")
    run("convert_weights.py", "bf16/model_final.pth", "rope_vit_reg4_demo16_back.safetensors")
    back = load_file(run.folder / "rope_vit_reg4_demo16_back.safetensors")
    assert torch.equal(back["class_token"], network.class_token.bfloat16())

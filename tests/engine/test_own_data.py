"""Data of the user's own, from the command line to a checkpoint that knows the classes."""

import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rope_vit_det.checkpoint.checkpointer import read_classes
from rope_vit_det.engine.command_line import add_own_data_options, argument_parser
from rope_vit_det.engine.rehearsal import rehearse_config
from rope_vit_det.engine.setup import check_config, load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError

ROOT = Path(__file__).parents[2]
TINY = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "128"),
    # a detector from random weights finds something at any score
    *("INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
)


@pytest.fixture(scope="module")
def mine(small_demo_dataset, tmp_path_factory):
    """The demo's data with other ids, in folders of other names; ids by name."""
    root = tmp_path_factory.mktemp("mine")
    ids = {}
    for split, name in (("train", "learn"), ("val", "exam")):
        shutil.copytree(small_demo_dataset / split, root / name)
        path = small_demo_dataset / "annotations" / f"instances_{split}.json"
        coco = json.loads(path.read_text())
        new = dict(zip([c["id"] for c in coco["categories"]], (90, 3, 12, 7), strict=True))
        for category in coco["categories"]:
            category["id"] = new[category["id"]]
            ids[category["name"]] = category["id"]
        for annotation in coco["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]
            del annotation["area"]  # as some annotation tools leave it out
        (root / f"{name}.json").write_text(json.dumps(coco))
    return root, ids


@pytest.fixture
def run(mine):
    def run(*arguments):
        tool = ROOT / "tools" / "train_net.py"
        config = ROOT / "configs" / "demo.yaml"
        return subprocess.run(
            [sys.executable, "-W", "ignore", tool, "--config-file", config, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=mine[0],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    return run


@pytest.fixture
def run_here(mine, monkeypatch, capsys):
    """For what ends before training: as `run`, without a process of its own."""

    def run(*arguments):
        config = ROOT / "configs" / "demo.yaml"
        argv = ["train_net.py", "--config-file", str(config), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.chdir(mine[0])
        # Detectron2's loggers of the run before hold its stream, which pytest has closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
        told = capsys.readouterr()
        return subprocess.CompletedProcess(argv, stop.value.code, told.out, told.err)

    return run


LEARN = ("--train-json", "learn.json", "--train-images", "learn")
EXAM = ("--val-json", "exam.json", "--val-images", "exam")


@pytest.fixture(scope="module")
def trained(mine):
    root, _ = mine
    tool, config = ROOT / "tools" / "train_net.py", ROOT / "configs" / "demo.yaml"
    command = [tool, "--config-file", config, *LEARN, *EXAM, *TINY, "OUTPUT_DIR", "out"]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return root / "out", answer.stdout


def test_classes_and_ids_travel_in_the_checkpoint(mine, trained):
    _, ids = mine
    out, log = trained
    assert "learn.json: 8 images" in log and "exam.json: 4 images" in log
    classes = read_classes(str(out / "model_final.pth"))
    assert dict(zip(classes["names"], classes["ids"], strict=True)) == ids
    assert classes["ids"] == sorted(ids.values())
    assert torch.load(out / "model_final.pth", weights_only=True)["classes"] == classes
    effective = yaml.safe_load((out / "config.yaml").read_text())
    assert effective["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4
    assert effective["DATASETS"]["OWN"]["TRAIN_JSON"] == "learn.json"
    results = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    assert results and {r["category_id"] for r in results} <= set(ids.values())


@pytest.mark.slow
def test_evaluation_needs_only_the_held_out_data(run, trained):
    out, _ = trained
    weights = ("MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", "again")
    answer = run(*EXAM, "--eval-only", *TINY, *weights)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "| category" in answer.stdout  # AP of each class
    assert (out.parent / "again" / "inference" / "coco_instances_results.json").exists()


@pytest.mark.parametrize("gone", ["learn.json", "learn"])
def test_a_runs_own_config_evaluates_where_its_training_data_is_not(
    mine, trained, tmp_path, monkeypatch, gone
):
    """Up to where the evaluation of `test_evaluation_needs_only_the_held_out_data` begins."""
    root, _ = mine
    for name in {"learn.json", "learn", "exam.json", "exam"} - {gone}:
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    out = root / "out"
    arguments = ["--config-file", str(out / "config.yaml"), "--eval-only"]
    args = add_own_data_options(argument_parser()).parse_args(
        [*arguments, "MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR", "again"]
    )
    cfg = load_config(args)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4 and cfg.DATASETS.TEST == ("own_val",)
    check_config(cfg, eval_only=True)
    rehearse_config(cfg, args, Trainer)  # the evaluation, on an image
    args.eval_only = False
    with pytest.raises(InputError, match=f"DATASETS.OWN.TRAIN_.* {gone}: no such f"):
        load_config(args)


def _refused(answer):
    assert answer.returncode == 2, answer.stderr[-2000:]
    assert "Traceback" not in answer.stderr
    line = answer.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_a_checkpoint_of_other_classes_is_refused(run_here, mine, trained):
    root, _ = mine
    coco = json.loads((root / "exam.json").read_text())
    coco["categories"][0]["name"] = "zebra"
    (root / "zebra.json").write_text(json.dumps(coco))
    options = ("--val-json", "zebra.json", "--val-images", "exam", "--eval-only")
    line = _refused(
        run_here(*options, "MODEL.WEIGHTS", "out/model_final.pth", "OUTPUT_DIR", "zebra")
    )
    assert "'zebra'" in line and "model_final.pth" in line and "number" in line


def test_faults_are_listed_and_fatal_ones_stop(run_here, mine):
    root, _ = mine
    coco = json.loads((root / "learn.json").read_text())
    coco["annotations"][0]["bbox"] = [9999, 0, 5, 5]
    coco["annotations"][1]["category_id"] = 1234
    coco["annotations"][2]["category_id"] = 1234
    (root / "bad.json").write_text(json.dumps(coco))
    bad = ("--train-json", "bad.json", "--train-images", "learn")
    line = _refused(run_here(*bad, *EXAM, "OUTPUT_DIR", "bad"))
    assert "2 annotations of a category" in line and "category 1234" in line
    listed = (root / "bad" / "dataset_faults.txt").read_text()
    assert listed.count("unknown category: ") == 2 and listed.count("outside: ") == 1
    image = next(i for i in coco["images"] if i["id"] == coco["annotations"][0]["image_id"])
    assert f"{image['file_name']!r} image {image['id']} annotation" in listed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train-json", "nowhere.json", *LEARN[2:]), "--train-json nowhere.json: no such file"),
        (("--train-json", "learn.json"), "--train-images is missing"),
        (EXAM, "--val-json without --train-json"),
        (
            ("DATASETS.OWN.TRAIN_JSON", "nowhere.json", "DATASETS.OWN.TRAIN_IMAGES", "learn"),
            "error: DATASETS.OWN.TRAIN_JSON nowhere.json: no such file",
        ),
        (("--eval-only", *EXAM, "--train-images", "learn"), "--train-json is missing"),
        ((*LEARN, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"), "learns from pixel maps"),
    ],
)
def test_options_that_do_not_go_together(run_here, options, message):
    assert message in _refused(run_here(*options))

"""What is wrong with an input ends the run before training, in one line that names it."""

import json
import logging
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import TRACE, hostile_files
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from rope_vit_det.checkpoint.checkpointer import check_weights_path
from rope_vit_det.data import register_demo_dataset
from rope_vit_det.engine import trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dataset(small_demo_dataset, tmp_path):
    """A copy of a small dataset, registered as "mine", to be spoilt."""
    root = tmp_path / "mine"
    shutil.copytree(small_demo_dataset, root)
    json_file = root / "annotations" / "instances_val.json"
    register_coco_instances("mine", {}, str(json_file), str(root / "val"))
    yield root
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs tools/train_net.py on "mine"; returns its line, having checked that it is just one."""

    def run(*arguments: str) -> str:
        def train(self):
            raise AssertionError("training was started")

        monkeypatch.setattr(trainer.Trainer, "train", train)
        # Detectron2's loggers of the run before hold its stream, which pytest has closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        argv = ["train_net.py", "--config-file", str(ROOT / "configs" / "demo.yaml"), *arguments]
        datasets = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
        if "DATASETS.TRAIN" in arguments:
            datasets = []
        monkeypatch.setattr(sys, "argv", argv + datasets + ["OUTPUT_DIR", str(tmp_path / "output")])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
        assert stop.value.code not in (0, None)
        told = capsys.readouterr().err
        assert "Traceback" not in told
        *before, line = told.strip().splitlines()
        assert line.startswith("error: ")
        # torch warns on its own account while Detectron2 logs the environment; a download that
        # does not come about shows its progress.
        assert all(re.match(r"W\d{4} .* torch/|.*B/s\]", other) for other in before), before
        return line

    return run


def test_a_dataset_path_that_does_not_exist(dataset, refused):
    (dataset / "val").rename(dataset / "elsewhere")
    line = refused()
    assert str(dataset / "val") in line and "DETECTRON2_DATASETS" in line


def test_a_dataset_json_that_does_not_exist(dataset, refused):
    (dataset / "annotations" / "instances_val.json").unlink()
    assert str(dataset / "annotations" / "instances_val.json") in refused()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{not json", "is not a JSON file"),
        ("[1, 2]", "not COCO"),
        ('{"images": []}', "annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "no images at all"),
    ],
)
def test_a_json_that_is_not_coco(dataset, refused, text, reason):
    path = dataset / "annotations" / "instances_val.json"
    path.write_text(text)
    line = refused()
    assert str(path) in line and reason in line


def test_an_image_that_the_disk_lacks(dataset, refused):
    (dataset / "val" / "000002.jpg").unlink()
    line = refused()
    assert "000002.jpg" in line and "instances_val.json" in line and "1 of 4" in line


def test_a_json_path_that_is_a_folder(dataset, refused):
    path = dataset / "annotations" / "instances_val.json"
    path.unlink()
    path.mkdir()
    line = refused()
    assert str(path) in line and "directory" in line


def test_a_json_without_anything_to_learn(dataset, refused):
    path = dataset / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(coco))
    line = refused()
    assert str(path) in line and "no annotation that could be learned from" in line


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated"),
        (lambda path: Image.new("RGB", (9, 7)).save(path), "9x7, not"),
    ],
)
@pytest.mark.parametrize("registered_as", ["coco", "pascal_voc"])
def test_an_image_that_is_not_what_the_dataset_says(dataset, refused, spoil, told, registered_as):
    spoil(dataset / "val" / "000002.jpg")
    if registered_as == "pascal_voc":  # a dataset that is no file of COCO's
        DatasetCatalog.get("mine")
        metadata = MetadataCatalog.get("mine").__dict__
        metadata["evaluator_type"] = registered_as
        del metadata["json_file"]
    line = refused()
    assert "000002.jpg" in line and told in line


def test_an_evaluator_that_nobody_knows(dataset, refused):
    del MetadataCatalog.get("mine").__dict__["evaluator_type"]
    assert "'mine' has evaluator_type None" in refused()


def test_the_demos_dataset_is_generated_by_the_demo(dataset, refused, monkeypatch, tmp_path):
    register_demo_dataset()
    metadata = MetadataCatalog.get("rope_vit_det_demo_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "nowhere.json"))
    line = refused("DATASETS.TRAIN", "('rope_vit_det_demo_train',)")
    assert "make demo generates it" in line


def test_another_number_of_categories(dataset, refused):
    line = refused("MODEL.ROI_HEADS.NUM_CLASSES", "80")
    assert "instances_val.json has 4 categories" in line
    assert "set MODEL.ROI_HEADS.NUM_CLASSES 4" in line


def _weights(tmp_path: Path, name: str, state: dict) -> str:
    path = tmp_path / name
    torch.save({"model": state}, path)
    return str(path)


@pytest.fixture
def state(detector_state):
    return dict(detector_state)


def test_a_checkpoint_of_another_architecture(dataset, refused, state, tmp_path):
    path = _weights(tmp_path, "other.pth", state)
    line = refused("MODEL.ROPE_VIT.NAME", "rope_vit_s16", "MODEL.WEIGHTS", path)
    assert path in line and "MODEL.ROPE_VIT.NAME" in line and "backbone.net." in line


def test_a_resnet_pickle(dataset, refused, tmp_path):
    path = tmp_path / "R-50.pkl"
    blobs = {"conv1_w": np.zeros((64, 3, 7, 7), np.float32), "res_conv1_bn_s": np.zeros(64)}
    path.write_bytes(pickle.dumps(blobs))
    line = refused("MODEL.WEIGHTS", str(path))
    assert str(path) in line and "none of the" in line and "MODEL.WEIGHTS" in line


def test_the_resnet_that_zoo_configs_name(dataset, refused):
    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    line = refused("MODEL.WEIGHTS", url)
    assert url in line and "no RoPE ViT" in line


def test_weights_that_do_not_exist(dataset, refused):
    assert "nowhere.pth: no such file" in refused("MODEL.WEIGHTS", "nowhere.pth")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("http://127.0.0.1:9/model.pth", "cannot be downloaded"),
        ("foo://model.pth", "nothing that reads foo://"),
        (".", "a folder, not a file"),
    ],
)
def test_weights_that_cannot_be_reached(dataset, refused, path, told):
    line = refused("MODEL.WEIGHTS", path)
    assert path in line and told in line


def test_the_zoo_is_for_other_backbones():
    check_weights_path("detectron2://ImageNetPretrained/MSRA/R-50.pkl", for_rope_vit=False)


HEAD = "roi_heads.box_predictor.cls_score.weight"


@pytest.mark.parametrize(
    "spoil", [lambda state: state.pop(HEAD), lambda state: state.update({HEAD: torch.ones(3, 3)})]
)
def test_evaluation_and_resuming_need_every_tensor(dataset, refused, state, tmp_path, spoil):
    spoil(state)
    path = _weights(tmp_path, "no_head.pth", state)
    line = refused("--eval-only", "MODEL.WEIGHTS", path)
    assert path in line and HEAD in line
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    Path(path).rename(output / "no_head.pth")
    (output / "last_checkpoint").write_text("no_head.pth")
    line = refused("--resume")
    assert str(output / "no_head.pth") in line and HEAD in line


def test_a_checkpoint_to_resume_from_that_is_not_named(dataset, refused, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "last_checkpoint").write_text("")
    assert "no checkpoint to resume from" in refused("--resume")


def test_some_but_not_all_backbone_tensors(dataset, refused, state, tmp_path):
    del state["backbone.net.encoder.block.2.attn.qkv.weight"]
    path = _weights(tmp_path, "partial.pth", state)
    line = refused("MODEL.WEIGHTS", path)
    assert path in line and "backbone.net.encoder.block.2.attn.qkv.weight" in line


def test_a_backbone_tensor_of_another_shape(dataset, refused, state, tmp_path):
    key = next(k for k in state if k.endswith("pos_embedding"))
    state[key] = state[key][:, :-3]
    path = _weights(tmp_path, "cut.pth", state)
    line = refused("MODEL.WEIGHTS", path)
    assert path in line and key in line and "IMAGE_SIZE" in line


def test_weights_that_the_config_disagrees_with(dataset, refused, birder_file):
    path, _ = birder_file()
    network = ("MODEL.ROPE_VIT.NAME", "rope_vit_reg1_t16")
    line = refused(*network, "MODEL.WEIGHTS", str(path), "INPUT.FORMAT", "BGR")
    assert f"birder:{path}" in line and "INPUT.FORMAT RGB" in line and "CHECK_WEIGHTS False" in line
    assert "MODEL.PIXEL_MEAN '[127.5, 114.75, 102.0]'" in line
    line = refused("MODEL.WEIGHTS", str(path))
    assert "MODEL.ROPE_VIT.NAME rope_vit_reg1_t16" in line
    # The switch lets it go on, to the next thing that is wrong.
    unchecked = ("MODEL.ROPE_VIT.CHECK_WEIGHTS", "False")
    assert "80" in refused(*network, "MODEL.WEIGHTS", str(path), *unchecked, *CLASSES_80)


CLASSES_80 = ("MODEL.ROI_HEADS.NUM_CLASSES", "80")


def test_weights_that_would_run_code(dataset, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = [p for p in hostile_files(tmp_path) if p.name.startswith("os-value")]
    for path in hostile:
        line = refused("MODEL.WEIGHTS", str(path))
        assert str(path) in line and "is refused" in line and "posix.mkdir" in line
    assert {p.suffix for p in hostile} == {".pt", ".pth", ".pkl"}
    assert not (tmp_path / TRACE).exists()


def test_float16_on_the_cpu(dataset, refused):
    line = refused("SOLVER.AMP.DTYPE", "float16")
    assert "SOLVER.AMP.DTYPE" in line and "bfloat16" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NAME", "rope_vit_xl99"),
        ("PT_GRID_SIZE", "[16, 16, 16]"),
        ("WINDOW_SIZE", "-1"),
        ("FREEZE_BLOCKS", "5"),
        ("PATCH_STRIDE", "8"),
    ],
)
def test_a_switch_with_a_wrong_value(dataset, refused, key, value):
    line = refused(f"MODEL.ROPE_VIT.{key}", value)
    assert f"MODEL.ROPE_VIT.{key} is" in line and "allowed: " in line


def test_a_key_that_does_not_exist(dataset, refused):
    assert "MODEL.ROPE_VIT.WINDOWS" in refused("MODEL.ROPE_VIT.WINDOWS", "8")


def test_a_config_that_does_not_exist(dataset, refused):
    assert "nowhere.yaml: no such file" in refused("--config-file", "nowhere.yaml")


def test_the_line_comes_from_a_fresh_process_too(tmp_path):
    config = ROOT / "configs" / "demo.yaml"
    misspelt = ("DATASETS.TRAIN", "('rope_vit_det_demo_trian',)")
    answer = subprocess.run(
        [sys.executable, ROOT / "tools" / "train_net.py", "--config-file", config, *misspelt],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert answer.returncode == 2
    assert answer.stderr.strip().splitlines()[-1].startswith("error: DATASETS.TRAIN")
    assert "did you mean 'rope_vit_det_demo_train'?" in answer.stderr
    assert "Traceback" not in answer.stderr

"""A LazyConfig is refused for what a yaml config is refused for, in its own words."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from stand_in import cut_down_lazy
from torch import nn

from rope_vit_det.engine import lazy
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.lazy import build_trainer, check_lazy_config, load_lazy_config, run_lazy
from rope_vit_det.engine.run_folder import TRACEBACK_FILE
from rope_vit_det.errors import InputError
from rope_vit_det.evaluation.fast import FastCOCOEvaluator
from rope_vit_det.evaluation.ground_truth import score_ground_truth

CONFIGS = Path(__file__).parents[2] / "configs"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py"
SPLITS = {"train": "train", "test": "val"}
FCOS = "COCO-Detection/fcos_rope_vit_reg4_b14_1x.py"


@pytest.fixture
def load(small_demo_dataset, tmp_path):
    """Loads a recipe for the demo's four classes, without weights."""
    for split, folder in SPLITS.items():
        path = small_demo_dataset / "annotations" / f"instances_{folder}.json"
        register_coco_instances(f"lazy_{split}", {}, str(path), str(small_demo_dataset / folder))
    classes = {MASK_RCNN: "model.roi_heads.num_classes=4", FCOS: "model.num_classes=4"}

    def load(name, *opts):
        fixed = [f"train.output_dir={tmp_path}", "train.init_checkpoint=", classes[name]]
        fixed += [
            "dataloader.train.dataset.names=lazy_train",
            "dataloader.test.dataset.names=lazy_test",
        ]
        return load_lazy_config(Namespace(config_file=[str(CONFIGS / name)], opts=[*fixed, *opts]))

    yield load
    for split in SPLITS:
        DatasetCatalog.remove(f"lazy_{split}")
        MetadataCatalog.remove(f"lazy_{split}")


@pytest.mark.parametrize("name", [MASK_RCNN, FCOS])
def test_what_fits_passes(load, name):
    check_lazy_config(load(name))


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        (MASK_RCNN, ["train.amp.dtype=float8"], "train.amp.dtype is 'float8'"),
        (MASK_RCNN, ["train.init_checkpoint=no.pth"], "train.init_checkpoint no.pth: no such file"),
        (
            MASK_RCNN,
            ["model.roi_heads.num_classes=80"],
            "4 categories, model.roi_heads.num_classes is 80; set model.roi_heads.num_classes 4",
        ),
        (FCOS, ["model.num_classes=80"], "4 categories, model.num_classes is 80"),
        (
            FCOS,
            ["dataloader.train.dataset.names=lazy_tran"],
            "dataloader.train.dataset.names: no dataset is registered as 'lazy_tran'; did you mean",
        ),
        (MASK_RCNN, ["dataloader.test.dataset.names=coco_2017_val"], "coco_2017_val.*prepare it"),
    ],
)
def test_what_does_not_is_named_by_its_own_key(load, name, opts, message):
    with pytest.raises(InputError, match=message):
        check_lazy_config(load(name, *opts))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-gpus", "3"), "dataloader.train.total_batch_size 64, .* does not divide by 3"),
        (("--num-gpus", "128"), "dataloader.train.total_batch_size 64, .* does not divide by 128"),
        (("--num-gpus", "0"), "--num-gpus 0: give 1 or more"),
        (("--num-machines", "2"), "needs --dist-url"),
    ],
)
def test_processes_that_cannot_run_or_share_a_batch(load, monkeypatch, flags, message):
    cfg = load(MASK_RCNN)
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    monkeypatch.setattr(lazy, "launch", lambda *args, **kwargs: pytest.fail("it begins"))
    with pytest.raises(InputError, match=message):
        run_lazy(argument_parser().parse_args([*flags, "--no-rehearsal"]))


def _fail():
    raise OverflowError("too much of sour")


def test_a_rehearsal_that_fails_says_so_in_a_new_folder(load, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "first"
    cfg = load(MASK_RCNN, f"train.output_dir={folder}")
    cfg.model = LazyCall(_fail)()
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    with pytest.raises(InputError, match="rehearsal, building the model: OverflowError too much"):
        run_lazy(argument_parser().parse_args([]))
    assert "in _fail\n" in (folder / TRACEBACK_FILE).read_text()


def test_a_folder_that_cannot_be_made_is_named_by_its_key(load, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cfg = load(MASK_RCNN, f"train.output_dir={tmp_path / 'file' / 'out'}")
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    with pytest.raises(InputError, match=r"train\.output_dir: .*file.*; name another folder"):
        run_lazy(argument_parser().parse_args([]))


def test_several_evaluators_are_rehearsed_on_the_ground_truth_as_one_is(load, monkeypatch):
    cfg = load(MASK_RCNN)
    cfg.dataloader.evaluator = [LazyCall(FastCOCOEvaluator)(dataset_name="lazy_test")]
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    ((name, build),) = lazy._parts(argument_parser().parse_args([]), "").test_sets.items()
    score = score_ground_truth(name, build()[1], detections_per_image=100)
    assert score.known and score.results["bbox"]["AP"] == score.results["segm"]["AP"] == 100


def test_a_training_without_an_evaluator_evaluates_nothing(load, monkeypatch, caplog):
    cfg = load(MASK_RCNN)
    del cfg.dataloader["evaluator"], cfg.dataloader["test"]
    check_lazy_config(cfg)
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    assert not lazy._parts(argument_parser().parse_args([]), "").test_sets
    assert lazy._test(cfg, nn.Identity()) == {}
    assert "no dataloader.evaluator: nothing is evaluated" in caplog.text


def test_what_is_rehearsed_for_an_evaluation_needs_no_training_data(load, monkeypatch):
    cfg = load(MASK_RCNN)
    del cfg.dataloader["train"]
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    parts = lazy._parts(argument_parser().parse_args(["--eval-only"]), "")
    assert list(parts.test_sets) == ["lazy_test"] and parts.train_step is None


@pytest.mark.parametrize(
    ("part", "eval_only", "needs"),
    [
        ("train", False, "a training"),
        ("evaluator", True, "--eval-only"),
        ("test", False, "dataloader.evaluator"),
        ("test", True, "dataloader.evaluator"),
    ],
)
def test_what_a_run_lacks_is_named_before_it(load, part, eval_only, needs):
    cfg = load(MASK_RCNN, "train.init_checkpoint=nowhere.pth")
    del cfg.dataloader[part]
    with pytest.raises(InputError, match=rf"no dataloader\.{part}, which {needs} needs"):
        check_lazy_config(cfg, eval_only=eval_only)


@pytest.mark.parametrize("tested", [True, False])
def test_faults_in_the_data(load, small_demo_dataset, tmp_path, tested):
    path = small_demo_dataset / "annotations" / "instances_train.json"
    coco = json.loads(path.read_text())
    coco["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(coco))
    register_coco_instances("bad", {}, str(tmp_path / "bad.json"), str(path.parents[1] / "train"))
    try:
        cfg = load(MASK_RCNN, "dataloader.train.dataset.names=bad")
        if not tested:
            del cfg.dataloader["evaluator"], cfg.dataloader["test"]
        with pytest.raises(InputError, match="1 annotations of a category"):
            check_lazy_config(cfg)
    finally:
        DatasetCatalog.remove("bad")
        MetadataCatalog.remove("bad")


def test_a_checkpoint_of_other_classes(load, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {}, "classes": {"names": ["a", "b"], "ids": [1, 2]}}, path)
    with pytest.raises(InputError, match="different categories: 4 and 2"):
        check_lazy_config(load(FCOS, f"train.init_checkpoint={path}"), eval_only=True)


def test_only_the_main_process_writes_a_log(load, tmp_path, monkeypatch):
    cfg = load(MASK_RCNN, "train.seed=1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(lazy, "load_lazy_config", lambda args: cfg)
    begun = []
    monkeypatch.setattr(lazy, "train", lambda cfg, resume: begun.append(cfg.train.output_dir))
    args = Namespace(config_file=[str(CONFIGS / MASK_RCNN)], eval_only=False, resume=False)
    lazy._run_in_process(args)
    assert begun == [str(tmp_path)] and not list(tmp_path.rglob("*.rank1"))


def test_a_loader_of_the_users_own_is_left_alone(load):
    cfg = load(FCOS)
    cfg.dataloader.train = [{"image": 1}]
    check_lazy_config(cfg)


@pytest.mark.slow
def test_birders_weights_arrive(stand_in, birder_file, tmp_path):
    path, oracle = birder_file("rope_vit_reg1_t16")
    cfg = load_lazy_config(Namespace(config_file=[str(CONFIGS / MASK_RCNN)], opts=[]))
    cfg = cut_down_lazy(cfg, "rope_vit_reg1_t16")
    cfg.train.output_dir, cfg.train.init_checkpoint = str(tmp_path), f"birder:{path}"
    net = build_trainer(cfg).model.backbone.net
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, oracle.state_dict()[name]), name


def test_detectron2s_evaluator_is_replaced_by_the_one_that_completes_ground_truth(load):
    cfg = load(MASK_RCNN, "dataloader.evaluator.output_dir=out")
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert type(evaluator) is FastCOCOEvaluator and evaluator._output_dir == "out"
    assert len(instantiate(cfg.dataloader.test)) == 4

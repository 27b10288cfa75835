"""Every recipe builds, and takes a step on the stand-in dataset at reduced size."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from stand_in import cut_down, cut_down_lazy

from rope_vit_det.config.keys import check_input_config, check_solver_config
from rope_vit_det.engine import lazy
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.models import VARIANTS
from rope_vit_det.weights import resolve

CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = ("backbones", "heads", "common")


def recipes(suffix):
    found = (path.relative_to(CONFIGS) for path in CONFIGS.glob(f"*/*{suffix}"))
    return sorted(path.as_posix() for path in found if path.parts[0] not in PARTS)


def load(name):
    return load_config(Namespace(config_file=[str(CONFIGS / name)], opts=[], num_gpus=1))


def losses_of_a_step(trainer):
    trainer.iter = 0
    with EventStorage() as trainer.storage:
        trainer.run_step()
        latest = trainer.storage.latest()
    losses = {key: value[0] for key, value in latest.items() if "loss" in key}
    assert all(torch.tensor(value).isfinite() for value in losses.values())
    return losses


# Cut down, networks of timm's differ from the others in numbers alone; cascades take the longest.
OTHERS = [name for name in recipes(".yaml") if "rope_vit" not in name or "cascade" in name]
STEPS = [pytest.param(n, marks=[pytest.mark.slow] * (n in OTHERS)) for n in recipes(".yaml")]


@pytest.mark.parametrize("name", STEPS)
def test_a_yaml_recipe_takes_a_step(stand_in, tmp_path, name):
    cfg = load(name)
    check_input_config(cfg)
    check_solver_config(cfg)
    cfg = cut_down(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    assert losses_of_a_step(Trainer(cfg))


@pytest.mark.parametrize("name", ["COCO-Detection/fcos_rope_vit_reg4_b14_1x.py"])
def test_a_lazy_recipe_takes_a_step(stand_in, tmp_path, name):
    # Those beside a yaml are compared with it: test_lazy_against_yaml.py
    cfg = cut_down_lazy(LazyConfig.load(str(CONFIGS / name)))
    cfg.train.output_dir = str(tmp_path)
    assert "loss_fcos_ctr" in losses_of_a_step(lazy.build_trainer(cfg))


@pytest.mark.parametrize("name", recipes(".yaml") + recipes(".py"))
def test_a_recipe_states_its_source(name):
    lines = (CONFIGS / name).read_text().splitlines()
    comment = " ".join(line for line in lines[:8] if line.startswith("#"))
    assert "arXiv" in comment or "model zoo" in comment


@pytest.mark.parametrize("name", recipes(".yaml"))
def test_batch_and_rate_follow_the_number_of_gpus(name):
    cfg = load(name)
    scaled = DefaultTrainer.auto_scale_workers(cfg, 1)
    workers = cfg.SOLVER.REFERENCE_WORLD_SIZE
    assert workers > 0
    assert scaled.SOLVER.IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH // workers == 2
    assert pytest.approx(cfg.SOLVER.BASE_LR / workers) == scaled.SOLVER.BASE_LR
    assert cfg.SOLVER.MAX_ITER * workers == scaled.SOLVER.MAX_ITER


def test_frozen_and_shallow_variants_keep_the_pretraining_grid():
    for name, frozen in (("frozen", -1), ("shallow", 8)):
        cfg = load(f"COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_{name}_1x.yaml")
        assert frozen == cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS
        assert cfg.MODEL.ROPE_VIT.PT_GRID_SIZE == [16, 16]


def test_lvis_samples_rare_classes_more_often(stand_in):
    cfg = cut_down(load("LVISv1-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml"))
    parts = build_detection_train_loader.from_config(cfg)
    assert isinstance(parts["sampler"], RepeatFactorTrainingSampler)
    assert Trainer.build_model(cfg).roi_heads.box_predictor.use_fed_loss


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS.rglob("*.yaml") if 'WEIGHTS: "timm://' in p.read_text("utf-8")]
)
def test_a_recipe_of_timms_weights_has_their_pixels_and_the_window_of_their_grid(path):
    if path.parent.name == "backbones":
        zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
        cfg = load_config(Namespace(config_file=[zoo, str(path)], opts=[], num_gpus=1))
    else:
        cfg = load(path)
    entry = resolve(cfg.MODEL.WEIGHTS.removeprefix("timm://"))
    assert entry.network == cfg.MODEL.ROPE_VIT.NAME and cfg.INPUT.FORMAT == "RGB"
    for key, values in (("MEAN", entry.rgb_mean), ("STD", entry.rgb_std)):
        assert cfg.MODEL[f"PIXEL_{key}"] == pytest.approx([255 * v for v in values], abs=1e-3)
    window = cfg.MODEL.ROPE_VIT.WINDOW_SIZE
    assert (window, window) == VARIANTS[entry.network]["default_pt_grid_size"]
    assert cfg.MODEL.ROPE_VIT.PT_GRID_SIZE is None  # their own way, which maps onto that grid


@pytest.mark.parametrize("size", ["base", "large"])
def test_eva02_learns_at_its_own_rate_for_the_batch(size):
    folder, network = "COCO-InstanceSegmentation", f"mask_rcnn_eva02_{size}_patch14_224"
    theirs, ours = (
        load(f"{folder}/cascade_{network}_eva02.yaml"),
        load(f"{folder}/{network}_1x.yaml"),
    )
    share = (ours.SOLVER.IMS_PER_BATCH / theirs.SOLVER.IMS_PER_BATCH) ** 0.5
    assert pytest.approx(theirs.SOLVER.BASE_LR * share, rel=5e-3) == ours.SOLVER.BASE_LR
    assert ours.SOLVER.LAYER_DECAY == theirs.SOLVER.LAYER_DECAY
    for key in ("NAME", "DROP_PATH_RATE", "WINDOW_SIZE"):
        assert ours.MODEL.ROPE_VIT[key] == theirs.MODEL.ROPE_VIT[key]


@pytest.mark.parametrize("name", [n for n in recipes(".yaml") if "_frozen_1x" in n])
def test_a_frozen_recipe_is_the_full_one_with_nothing_learning(name):
    frozen, full = load(name), load(name.replace("_frozen", ""))
    assert frozen.MODEL.ROPE_VIT.FREEZE_BLOCKS == -1
    full.defrost(), frozen.defrost()
    for cfg in (frozen, full):
        cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS, cfg.SOLVER.BASE_LR = 0, 0.1
        cfg.MODEL.ROPE_VIT.PT_GRID_SIZE = None  # birder's: as frozen networks want it
    assert frozen == full

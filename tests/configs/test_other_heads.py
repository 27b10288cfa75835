"""Heads of other projects, by their own configs, as docs/other_heads.md says."""

import importlib.util
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from stand_in import cut_down

from rope_vit_det import add_rope_vit_config
from rope_vit_det.config.run_config import merge_from_yaml
from rope_vit_det.engine.setup import check_settings, load_config
from rope_vit_det.errors import InputError
from rope_vit_det.pyramids import uses_all_parameters

ROOT = Path(__file__).parents[2]
OVERLAY = str(ROOT / "configs" / "backbones" / "rope_vit_reg4_b14.yaml")
PANOPTIC = "panoptic_stand_in"
# What matters here of the projects' own configs for Cityscapes.
OWN = {
    "deeplab_v3_plus": """
MODEL:
  META_ARCHITECTURE: "SemanticSegmentor"
  BACKBONE: {NAME: "build_resnet_deeplab_backbone", FREEZE_AT: 0}
  RESNETS:
    {DEPTH: 101, NORM: "SyncBN", OUT_FEATURES: ["res2", "res5"], RES5_DILATION: 2,
     RES5_MULTI_GRID: [1, 2, 4], STEM_TYPE: "deeplab", STEM_OUT_CHANNELS: 128, STRIDE_IN_1X1: False}
  SEM_SEG_HEAD:
    {NAME: "DeepLabV3PlusHead", IN_FEATURES: ["res2", "res5"], PROJECT_FEATURES: ["res2"],
     PROJECT_CHANNELS: [48], ASPP_CHANNELS: 256, ASPP_DILATIONS: [6, 12, 18], ASPP_DROPOUT: 0.1,
     CONVS_DIM: 256, COMMON_STRIDE: 4, NUM_CLASSES: 19, LOSS_TYPE: "hard_pixel_mining",
     NORM: "SyncBN"}
SOLVER: {BASE_LR: 0.01, MAX_ITER: 90000, LR_SCHEDULER_NAME: "WarmupPolyLR", IMS_PER_BATCH: 16}
INPUT:
  FORMAT: "RGB"
  CROP: {ENABLED: True, TYPE: "absolute", SIZE: [512, 1024], SINGLE_CATEGORY_MAX_AREA: 1.0}
VERSION: 2
""",
    "panoptic_deeplab": """
MODEL:
  META_ARCHITECTURE: "PanopticDeepLab"
  BACKBONE: {NAME: "build_resnet_deeplab_backbone", FREEZE_AT: 0}
  RESNETS:
    {OUT_FEATURES: ["res2", "res3", "res5"], RES5_DILATION: 2, RES5_MULTI_GRID: [1, 2, 4],
     STEM_TYPE: "deeplab"}
  SEM_SEG_HEAD:
    {NAME: "PanopticDeepLabSemSegHead", IN_FEATURES: ["res2", "res3", "res5"],
     PROJECT_FEATURES: ["res2", "res3"], PROJECT_CHANNELS: [32, 64], HEAD_CHANNELS: 256,
     CONVS_DIM: 256, NUM_CLASSES: 19, LOSS_TYPE: "hard_pixel_mining", NORM: "SyncBN"}
  INS_EMBED_HEAD: {CONVS_DIM: 128, NORM: "SyncBN", CENTER_LOSS_WEIGHT: 200.0}
  PANOPTIC_DEEPLAB: {STUFF_AREA: 2048, CENTER_THRESHOLD: 0.1, NMS_KERNEL: 7, TOP_K_INSTANCE: 200}
SOLVER:
  {OPTIMIZER: "ADAM", BASE_LR: 0.001, WEIGHT_DECAY: 0.0, MAX_ITER: 90000, IMS_PER_BATCH: 32,
   LR_SCHEDULER_NAME: "WarmupPolyLR"}
INPUT: {FORMAT: "RGB", CROP: {ENABLED: True, TYPE: "absolute", SIZE: [512, 1024]}}
VERSION: 2
""",
}


@pytest.fixture
def panopticapi(monkeypatch):
    """Panoptic-DeepLab needs a function of a package that PyPI has not."""
    if importlib.util.find_spec("panopticapi") is None:
        utils = ModuleType("panopticapi.utils")
        utils.rgb2id = lambda colour: colour.astype(np.int32) @ np.array([1, 256, 256 * 256])
        monkeypatch.setitem(sys.modules, "panopticapi", ModuleType("panopticapi"))
        monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)


@pytest.fixture
def panoptic(stand_in, tmp_path):
    """The stand-in with a panoptic map: stuff on the left, a thing on the right."""
    records = []
    for record in DatasetCatalog.get(stand_in)[:2]:
        ids = np.zeros((record["height"], record["width"], 3), dtype=np.uint8)
        ids[:, :, 0] = 1  # BGR: the ids are 256 ** 2 and 2
        ids[10:90, 40:] = (0, 0, 2)
        file = str(tmp_path / f"{record['image_id']}.png")
        cv2.imwrite(file, ids)
        segments = [
            {"id": 256**2, "category_id": 0, "iscrowd": False},
            {"id": 2, "category_id": 11, "iscrowd": False},
        ]
        records.append({**record, "pan_seg_file_name": file, "segments_info": segments})
    DatasetCatalog.register(PANOPTIC, lambda: records)
    classes = {11: 11}
    MetadataCatalog.get(PANOPTIC).set(
        thing_dataset_id_to_contiguous_id=classes, ignore_label=255, label_divisor=1000
    )
    yield PANOPTIC
    DatasetCatalog.remove(PANOPTIC)
    MetadataCatalog.remove(PANOPTIC)


def config_of(name, folder):
    own = folder / "own.yaml"
    own.write_text(OWN[name])
    files = [str(own), str(ROOT / "configs" / "heads" / f"{name}.yaml"), OVERLAY]
    return load_config(Namespace(config_file=files, opts=["OUTPUT_DIR", str(folder)], num_gpus=1))


def trainer_of_the_docs():
    page = (ROOT / "docs" / "other_heads.md").read_text()
    code = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Trainer" in b)
    names = {"__name__": "train_deeplab"}
    exec(code, names)
    return names["DeepLabTrainer"]


def step(cfg):
    """A step of training, in which every parameter learns, and an inference."""
    trainer = trainer_of_the_docs()(cfg)
    trainer.iter = 0
    with EventStorage() as trainer.storage:
        trainer.run_step()
        latest = trainer.storage.latest()
    losses = {key: value[0] for key, value in latest.items() if "loss" in key}
    assert losses and all(np.isfinite(value) for value in losses.values())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert uses_all_parameters(trainer.model)
    with torch.inference_mode():
        # ASPP takes multiples of the crop alone.
        image = {"image": torch.zeros(3, 128, 192, dtype=torch.uint8), "height": 90, "width": 120}
        (found,) = trainer.model.eval()([image])
    assert found["sem_seg"].shape == (19, 90, 120) and found["sem_seg"].isfinite().all()
    return trainer, losses


def small(cfg, dataset):
    cfg = cut_down(cfg)
    cfg.INPUT.CROP.SIZE = (64, 96)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset,)
    return cfg


def test_deeplab_v3_plus(stand_in, tmp_path):
    cfg = config_of("deeplab_v3_plus", tmp_path)
    check_settings(cfg)
    trainer, _ = step(small(cfg, stand_in))
    strides = {name: shape.stride for name, shape in trainer.model.backbone.output_shape().items()}
    assert strides == {"res2": 4, "res5": 32}
    assert trainer.model.sem_seg_head.decoder["res5"]["project_conv"].convs[1].dilation == (3, 3)
    assert type(trainer.scheduler).__name__ == "WarmupPolyLR"


def test_panoptic_deeplab(panopticapi, panoptic, tmp_path):
    cfg = config_of("panoptic_deeplab", tmp_path)
    check_settings(cfg)
    trainer, losses = step(small(cfg, panoptic))
    assert {"loss_sem_seg", "loss_center", "loss_offset"} <= losses.keys()
    assert list(trainer.model.backbone.output_shape()) == ["res2", "res3", "res5"]
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("name", OWN)
def test_the_overlay_changes_what_stride_32_asks_for_and_no_more(panopticapi, tmp_path, name):
    cfg = config_of(name, tmp_path)
    own = get_cfg()
    add_rope_vit_config(own)
    merge_from_yaml(own, str(tmp_path / "own.yaml"))
    assert cfg.MODEL.RESNETS.RES5_DILATION == 1 and own.MODEL.RESNETS.RES5_DILATION == 2
    for head in {"SEM_SEG_HEAD", "INS_EMBED_HEAD"} & set(own.MODEL):
        assert cfg.MODEL[head].ASPP_DILATIONS == [3, 6, 9]
        own.MODEL[head].ASPP_DILATIONS = [3, 6, 9]
        assert cfg.MODEL[head] == own.MODEL[head]
    assert cfg.INPUT.CROP == own.INPUT.CROP


def test_a_configs_own_values_survive_the_keys_of_a_project(tmp_path, panopticapi):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    for text in (
        "MODEL: {SEM_SEG_HEAD: {NAME: DeepLabV3PlusHead, ASPP_DILATIONS: [1, 2, 3]}}",
        "MODEL: {META_ARCHITECTURE: PanopticDeepLab}",
    ):
        (tmp_path / "a.yaml").write_text(text)
        merge_from_yaml(cfg, str(tmp_path / "a.yaml"))
    assert cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS == [1, 2, 3]
    assert cfg.SOLVER.OPTIMIZER == "AdamW"  # ours; the project's own default is ADAM
    assert cfg.MODEL.INS_EMBED_HEAD.IN_FEATURES == ["res2", "res3", "res5"]
    # What a run leaves as its config can be read again.
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_rope_vit_config(again)
    merge_from_yaml(again, str(tmp_path / "dump.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_a_missing_package_of_a_project_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.projects.panoptic_deeplab", None)
    (tmp_path / "a.yaml").write_text(OWN["panoptic_deeplab"])
    cfg = get_cfg()
    with pytest.raises(InputError, match=r"a\.yaml needs detectron2\.projects\.panoptic_deeplab"):
        merge_from_yaml(cfg, str(tmp_path / "a.yaml"))

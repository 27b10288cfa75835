"""Large-scale jitter under INPUT.LSJ against Detectron2's own, of its lazy new_baselines."""

import copy

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog

from rope_vit_det import add_rope_vit_config
from rope_vit_det.config.keys import check_input_config
from rope_vit_det.data.large_scale_jitter import build_train_mapper
from rope_vit_det.errors import InputError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.LSJ.ENABLED = True
    return cfg


def test_it_equals_detectron2s(cfg, stand_in):
    oracle = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    oracle = instantiate(oracle.dataloader.train.mapper)
    ours = build_train_mapper(cfg)
    flipped = 0
    for record in DatasetCatalog.get(stand_in):
        for seed in range(6):
            found = []
            for mapper in (ours, oracle):
                np.random.seed(seed)
                found.append(mapper(copy.deepcopy(record)))
            a, b = found
            assert a["image"].shape == (3, 1024, 1024)
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
            assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
            for p, q in zip(a["instances"].gt_masks, b["instances"].gt_masks, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(p, q, strict=True))
            flipped += bool((a["image"][:, :, 0] == 128).all())
    assert flipped  # padding that a flip has brought to the left


def test_scales_and_size_are_the_configs(cfg, stand_in):
    cfg.INPUT.LSJ.IMAGE_SIZE = 64
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 0.5
    cfg.INPUT.RANDOM_FLIP = "none"
    record = copy.deepcopy(DatasetCatalog.get(stand_in)[0])  # 96 high, 128 wide
    image = build_train_mapper(cfg)(record)["image"]
    assert image.shape == (3, 64, 64)
    assert (image[:, 24:] == 128).all() and (image[:, :, 32:] == 128).all()
    assert not (image[:, :24, :32] == 128).all()


def test_without_it_the_mapper_is_detectron2s(cfg):
    cfg.INPUT.LSJ.ENABLED = False
    assert "ResizeShortestEdge" in str(build_train_mapper(cfg).augmentations)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LSJ.MIN_SCALE", 3.0, "INPUT.LSJ.MIN_SCALE"),
        ("CROP.ENABLED", True, "set INPUT.CROP.ENABLED False"),
    ],
)
def test_wrong_values_are_named(cfg, key, value, message):
    cfg.merge_from_list([f"INPUT.{key}", value])
    with pytest.raises(InputError, match=message):
        check_input_config(cfg)

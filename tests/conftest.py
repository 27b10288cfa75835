"""What several tests need: moved-off-initial networks, small detector configs."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from rope_vit_det import add_rope_vit_config


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def detector_cfg() -> CfgNode:
    """An unmodified model-zoo Mask R-CNN with a small RoPE ViT under it, on the CPU."""
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(
        model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    )
    cfg.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone"
    cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg1_t16"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg

"""A dataset that stands in for COCO, LVIS, Cityscapes and VOC, and configs cut down to a step."""

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from omegaconf import DictConfig

from rope_vit_det.models import VARIANTS

NAME = "stand_in"
CLASSES = 1230  # LVIS v0.5 has the most; every smaller set of classes is a part of it
KEYPOINTS = 17


def register_stand_in(folder) -> None:
    """Registers four images with boxes, polygons, keypoints and a semantic map, under NAME."""
    rng = np.random.default_rng(0)
    records = []
    for i, (height, width) in enumerate([(96, 128), (128, 96), (110, 110), (90, 140)]):
        image, stuff = str(folder / f"{i}.jpg"), str(folder / f"{i}.png")
        cv2.imwrite(image, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cv2.imwrite(stuff, rng.integers(0, 8, (height, width), dtype=np.uint8))
        records.append(
            {
                "file_name": image,
                "sem_seg_file_name": stuff,
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": [_annotation(rng, height, width) for _ in range(3)],
            }
        )
    DatasetCatalog.register(NAME, lambda: records)
    names = [f"point {i}" for i in range(KEYPOINTS)]
    MetadataCatalog.get(NAME).set(
        thing_classes=[f"thing {i}" for i in range(CLASSES)],
        stuff_classes=[f"stuff {i}" for i in range(54)],
        keypoint_names=names,
        keypoint_flip_map=[],
        # for the federated loss of LVIS v1
        class_image_count=[{"id": i + 1, "image_count": i + 1} for i in range(1203)],
    )


def unregister_stand_in() -> None:
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def _annotation(rng: np.random.Generator, height: int, width: int) -> dict:
    w, h = rng.uniform(30, 60, 2)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    points = rng.uniform((x, y), (x + w, y + h), (KEYPOINTS, 2))
    visible = np.full((KEYPOINTS, 1), 2.0)
    return {
        "bbox": [x, y, w, h],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,  # the one class that keypoint configs have
        "iscrowd": 0,
        "segmentation": [[float(v) for v in corners]],
        "keypoints": np.concatenate((points, visible), axis=1).ravel().tolist(),
    }


def cut_down(cfg: CfgNode, variant: str = "rope_vit_reg4_demo16") -> CfgNode:
    """The same config for a step on the CPU: a small network, the stand-in, small images."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROPE_VIT.NAME = variant
    depth = VARIANTS[variant]["num_layers"]
    cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = min(cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS, depth - 1)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96, 128), 192
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 192
    cfg.INPUT.LSJ.IMAGE_SIZE = 128
    cfg.SOLVER.IMS_PER_BATCH = max(2, cfg.SOLVER.ACCUMULATE)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    return cfg


def cut_down_lazy(cfg: DictConfig, variant: str = "rope_vit_reg4_demo16") -> DictConfig:
    """A LazyConfig cut down as :func:`cut_down` does with a yaml config."""
    cfg.train.device = "cpu"
    cfg.train.init_checkpoint = ""
    cfg.model.backbone.net.name = variant
    if "roi_heads" in cfg.model:
        cfg.model.roi_heads.batch_size_per_image = 8
        cfg.model.proposal_generator.post_nms_topk = (50, 10)
    data = cfg.dataloader
    data.train.dataset.names = data.test.dataset.names = NAME
    data.train.num_workers = data.test.num_workers = 0
    data.train.total_batch_size = 2
    for augmentation in data.train.mapper.augmentations:
        for key, value in SMALLER.items():
            if key in augmentation:
                augmentation[key] = value
    data.test.mapper.augmentations[0].short_edge_length = 96
    data.test.mapper.augmentations[0].max_size = 192
    return cfg


SMALLER = {
    "short_edge_length": (96, 128),
    "max_size": 192,
    "target_height": 128,
    "target_width": 128,
    "crop_size": (128, 128),
}

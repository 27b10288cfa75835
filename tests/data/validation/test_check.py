"""What is checked of a dataset against the config."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from rope_vit_det.data.validation.check import check_datasets
from rope_vit_det.errors import InputError


def test_there_is_a_sigma_for_each_keypoint(detector_cfg, small_demo_dataset, tmp_path):
    json_file = small_demo_dataset / "annotations" / "instances_val.json"
    register_coco_instances("points", {}, str(json_file), str(small_demo_dataset / "val"))
    cfg = detector_cfg
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ("points",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.KEYPOINT_ON = 4, True
    try:
        check_datasets(cfg, eval_only=True)  # 17, as COCO's
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
        with pytest.raises(InputError, match=r"KEYPOINT_OKS_SIGMAS has 17.*NUM_KEYPOINTS is 3"):
            check_datasets(cfg, eval_only=True)
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * 3
        check_datasets(cfg, eval_only=True)
    finally:
        DatasetCatalog.remove("points")
        MetadataCatalog.remove("points")

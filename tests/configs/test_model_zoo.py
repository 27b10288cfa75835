"""The backbone under every FPN and RetinaNet config of the installed model zoo."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.utils.events import EventStorage
from stand_in import cut_down

from rope_vit_det import use_rope_vit
from rope_vit_det.config.run_config import ZOO
from rope_vit_det.engine.setup import check_settings, load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAY = str(CONFIGS / "backbones" / "rope_vit_reg4_b14.yaml")
POINTREND = str(CONFIGS / "heads" / "pointrend.yaml")
POINTREND_SEMANTIC = str(CONFIGS / "heads" / "pointrend_semantic.yaml")
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"

ALL = sorted(path.relative_to(ZOO).as_posix() for path in ZOO.rglob("*.yaml"))
# Part of a name: why such configs are left out.
LEFT_OUT = {
    "C4": "heads on a ResNet's own stage, no pyramid",
    "DC5": "heads on a ResNet's own dilated stage, no pyramid",
    "DilatedC5": "heads on a ResNet's own dilated stage, no pyramid",
    "fast_rcnn": "needs precomputed proposals",
}
WALKED = [
    name
    for name in ALL
    if not any(f"{part}" in name.replace("faster_rcnn", "faster") for part in LEFT_OUT)
]
# One for each meta architecture and kind of head.
FAST = [
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
]


def with_overlay(*files):
    args = Namespace(config_file=[*files, OVERLAY], opts=[], num_gpus=1)
    return cut_down(load_config(args))


def step_and_inference(cfg, dataset):
    """A training step and an inference, with everything that they must bring."""
    trainer = Trainer(cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.backbone.named_parameters()}
    trainer.iter = 0
    with EventStorage() as trainer.storage:
        trainer.run_step()
        latest = trainer.storage.latest()
    losses = {key: value[0] for key, value in latest.items() if "loss" in key}
    assert losses and all(torch.tensor(value).isfinite() for value in losses.values())
    for name, parameter in trainer.model.backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert torch.equal(parameter, before[name]), name
    model = trainer.model.eval()
    batch = next(iter(Trainer.build_test_loader(cfg, dataset)))
    with torch.inference_mode():
        (output,) = model(batch)
    assert output
    for found in output.values():
        if isinstance(found, torch.Tensor):
            assert found.isfinite().all()
        elif hasattr(found, "pred_boxes"):
            assert found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
    return trainer.model


@pytest.mark.parametrize("name", FAST)
def test_one_config_of_each_kind_trains_and_predicts(stand_in, name):
    assert name in WALKED
    model = step_and_inference(with_overlay(name), stand_in)
    levels = range(3, 8) if "retinanet" in name else range(2, 7)
    assert list(model.backbone.output_shape()) == [f"p{level}" for level in levels]


@pytest.mark.parametrize(
    "files",
    [WALKED, [(MASK_RCNN, POINTREND), (SEMANTIC, POINTREND_SEMANTIC)]],
    ids=["alone", "pointrend"],
)
def test_the_checks_of_settings_refuse_none_of_them(stand_in, tmp_path, files):
    for each in files:
        names = [each] if isinstance(each, str) else each
        opts = ["OUTPUT_DIR", str(tmp_path)]
        check_settings(load_config(Namespace(config_file=[*names, OVERLAY], opts=opts, num_gpus=1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WALKED if name not in FAST])
def test_every_other_config_trains_and_predicts(stand_in, name):
    step_and_inference(with_overlay(name), stand_in)


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKED)
def test_use_rope_vit_puts_the_overlays_backbone_there(name):
    small = ["MODEL.ROPE_VIT.NAME", "rope_vit_reg4_demo16", "MODEL.DEVICE", "cpu"]
    expected = load_config(Namespace(config_file=[name, OVERLAY], opts=small, num_gpus=1))
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / name), allow_unsafe=True)
    use_rope_vit(cfg, network="rope_vit_reg4_demo16")
    # Windows, norms and the optimizer are the overlay's own choice.
    cfg.MODEL.ROPE_VIT.WINDOW_SIZE, cfg.MODEL.FPN.NORM, cfg.MODEL.DEVICE = 16, "FastLN", "cpu"
    assert str(build_backbone(cfg)) == str(build_backbone(expected))
    for key in cfg.MODEL.keys() - {"BACKBONE", "WEIGHTS", "PIXEL_MEAN", "PIXEL_STD"}:
        assert cfg.MODEL[key] == expected.MODEL[key], key


@pytest.mark.parametrize(
    ("files", "losses_of"),
    [((MASK_RCNN, POINTREND), "mask_head.point_head"), ((SEMANTIC, POINTREND_SEMANTIC), "")],
)
def test_pointrend(stand_in, files, losses_of):
    pytest.importorskip(
        "detectron2.projects.point_rend", reason="this Detectron2 comes without PointRend"
    )
    model = step_and_inference(with_overlay(*files), stand_in)
    assert any("point_head" in name for name, _ in model.named_parameters())


def test_the_walk_leaves_out_what_it_says_and_no_more():
    assert len(WALKED) > 40
    assert {name for name in ALL if "FPN" in name and "fast_rcnn" not in name} <= set(WALKED)


@pytest.mark.parametrize(
    "name", [name for name in ALL if "C4" in name or "DC5" in name or "DilatedC5" in name]
)
def test_configs_without_a_pyramid_are_refused(stand_in, name):
    with pytest.raises(InputError, match="start from an FPN or RetinaNet config"):
        Trainer.build_model(with_overlay(name))

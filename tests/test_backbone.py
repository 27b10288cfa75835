"""The backbones in Detectron2: shapes, padding, gradients, switches, loading."""

import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from helpers import DEMO_CONFIG, detector_input, relative_difference

from rope_vit_det import add_rope_vit_config
from rope_vit_det.backbone import create_backbone
from rope_vit_det.errors import InputError
from rope_vit_det.pyramids import check_features, uses_all_parameters

RECIPE = (
    DEMO_CONFIG.parent / "COCO-InstanceSegmentation" / "mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml"
)


def test_pyramid_has_p2_to_p6(detector_cfg):
    backbone = build_model(detector_cfg).backbone
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == {
        f"p{level}": (256, 2**level) for level in range(2, 7)
    }
    features = backbone(torch.zeros(1, 3, 224, 160))
    for level in range(2, 6):
        assert features[f"p{level}"].shape == (1, 256, 224 >> level, 160 >> level)


def test_retinanet_pyramid_has_p3_to_p7(detector_cfg):
    detector_cfg.MODEL.BACKBONE.NAME = "build_retinanet_rope_vit_sfp_backbone"
    detector_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    detector_cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    model = build_model(detector_cfg)
    shapes = model.backbone.output_shape()
    assert {k: v.stride for k, v in shapes.items()} == {f"p{i}": 2**i for i in range(3, 8)}
    with EventStorage():
        losses = model([detector_input(100, 150)])
    assert all(loss.isfinite() for loss in losses.values())


def build_for(cfg, **keys):
    """The backbone that a config's heads get, with these IN_FEATURES by section."""
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone_for_heads"
    for section, levels in keys.items():
        if section not in cfg.MODEL:
            cfg.MODEL[section] = CfgNode()
        cfg.MODEL[section].IN_FEATURES = levels
    return build_backbone(cfg).eval()


def test_res2_to_res5_are_p2_to_p5_under_other_names(detector_cfg):
    detector_cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    expected = build_for(detector_cfg, SEM_SEG_HEAD=["p2", "p3", "p4", "p5"])
    backbone = build_for(detector_cfg, SEM_SEG_HEAD=["res2", "res3", "res4", "res5"])
    shapes = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert shapes == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert backbone.size_divisibility == 32
    backbone.load_state_dict(expected.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, maps = backbone(images), expected(images)
    assert list(features) == list(shapes)
    assert all(torch.equal(features[f"res{i}"], maps[f"p{i}"]) for i in range(2, 6))


def test_levels_that_no_head_reads_are_not_built(detector_cfg):
    detector_cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    whole = build_for(detector_cfg, SEM_SEG_HEAD=["res2", "res3", "res4", "res5"])
    backbone = build_for(detector_cfg, SEM_SEG_HEAD=["res5", "res3"])
    backbone.load_state_dict(whole.state_dict(), strict=False)
    assert not [k for k in backbone.state_dict() if k.startswith(("simfp_2", "simfp_4"))]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, expected = backbone(images), whole(images)
    assert list(features) == list(backbone.output_shape()) == ["res3", "res5"]
    assert all(torch.equal(features[name], expected[name]) for name in features)
    with pytest.raises(InputError, match=r"no feature 'res2', only res3, res5.*\(res2 to res5\)"):
        backbone.output_shape()["res2"]


def test_an_rcnn_on_res2_to_res5_trains(detector_cfg):
    cfg, levels = detector_cfg, ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone_for_heads"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = levels
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256]]
    check_features(cfg)
    model = build_model(cfg)
    with EventStorage():
        losses = model([detector_input(100, 150)])
    sum(losses.values()).backward()
    assert uses_all_parameters(model)
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("keys", "first", "last"),
    [
        ({}, "p2", "p6"),  # as far as one can see
        ({"SEM_SEG_HEAD": ["res2", "res3", "res4", "res5"]}, "res2", "res5"),
        ({"SEM_SEG_HEAD": ["res5"]}, "res2", "res5"),  # its heads may read more than they say
        ({"ROI_HEADS": ["res2", "res3"]}, "res2", "res5"),
        ({"FCOS": ["p3", "p4", "p5", "p6", "p7"]}, "p3", "p7"),
        ({"FCOS": ["p3", "p4"], "FPN": ["res3", "res4"], "BiFPN": ["res3"]}, "p2", "p6"),
    ],
)
def test_what_heads_of_other_projects_read(keys, first, last):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg1_t16"
    cfg.MODEL.META_ARCHITECTURE = "SomebodyElses"
    features = list(build_for(cfg, **keys).output_shape())
    assert (features[0], features[-1]) == (first, last)


def test_the_generators_of_other_projects_count_under_an_rcnn(detector_cfg):
    detector_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "CenterNet"
    levels = ["p3", "p4", "p5", "p6", "p7"]
    shapes = build_for(detector_cfg, CENTERNET=levels, ROI_HEADS=levels[:3]).output_shape()
    assert list(shapes) == levels


def test_features_that_no_pyramid_has_together_are_named(detector_cfg):
    cfg = detector_cfg
    cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    key = "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    cfg.MODEL.SEM_SEG_HEAD[key] = ["res3", "res4", "res5"]  # p2 to p5 is Detectron2's default
    with pytest.raises(InputError, match=rf"SEM_SEG_HEAD.IN_FEATURES \['p2'.*{key} \['res3'"):
        build_for(cfg)


@pytest.mark.parametrize("stride", [16, 14])
def test_neck_alone(detector_cfg, stride):
    detector_cfg.MODEL.BACKBONE.NAME = "build_rope_vit_backbone"
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_t14"
    detector_cfg.MODEL.ROPE_VIT.PATCH_STRIDE = stride
    backbone = build_backbone(detector_cfg)
    assert backbone.output_shape()["neck"].stride == backbone.size_divisibility == stride
    assert backbone(torch.zeros(1, 3, stride * 5, stride * 7))["neck"].shape == (1, 192, 5, 7)
    assert all(key.startswith("net.") for key in backbone.state_dict())


@pytest.mark.parametrize("size", [(200, 270), (31, 500), (224, 224)])
def test_batches_are_padded_to_32_and_never_to_a_square(detector_cfg, size):
    model = build_model(detector_cfg).eval()
    batch = model.preprocess_image([detector_input(*size)]).tensor
    assert batch.shape[2:] == tuple(-(-side // 32) * 32 for side in size)
    seen = []
    model.backbone.net.register_forward_hook(lambda m, args, out: seen.append(out["neck"].shape))
    with torch.inference_mode():
        model([detector_input(*size)])
    assert seen[0][2:] == (batch.shape[2] // 16, batch.shape[3] // 16)


def test_an_unpadded_image_would_be_refused_not_cropped(detector_cfg):
    backbone = build_model(detector_cfg).backbone
    with pytest.raises(ValueError, match="200x270"):
        backbone(torch.zeros(1, 3, 200, 270))


def test_freeze_at_of_resnets_freezes_nothing_and_says_so(detector_cfg, caplog):
    assert detector_cfg.MODEL.BACKBONE.FREEZE_AT == 2
    with caplog.at_level(logging.INFO, logger="rope_vit_det.backbone"):
        model = build_model(detector_cfg)
    assert all(p.requires_grad for p in model.parameters())
    assert [r for r in caplog.records if "MODEL.BACKBONE.FREEZE_AT" in r.getMessage()]


def test_freeze_blocks_freezes(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = -1
    model = build_model(detector_cfg)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in trainable if name.startswith("backbone.net.")]
    assert [name for name in trainable if name.startswith("backbone.simfp_2")]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("NAME", "rope_vit_b15", "rope_vit_reg4_b14"),
        ("NAME", ["rope_vit_t16"], "rope_vit_reg4_b14"),
        ("NAME", None, "rope_vit_reg4_b14"),
        ("PT_GRID_SIZE", [16, 16, 16], r"\[h, w\]"),
        ("PT_GRID_SIZE", "counting", '"count"'),
        ("PT_GRID_SIZE", [0, 16], r"\[h, w\]"),
        ("WINDOW_SIZE", -1, "0 or more .0: no windows."),
        ("WINDOW_SIZE", 0.0, "0 or more .0: no windows."),
        ("WINDOW_SIZE", False, "0 or more .0: no windows."),
        ("FREEZE_BLOCKS", 13, "1 to 12"),
        ("FREEZE_BLOCKS", -2, "-1 .all."),
        ("DTYPE", "bfloat16", "where FREEZE_BLOCKS is -1"),
        ("DTYPE", "float16", '"float32"'),
        ("PATCH_STRIDE", 8, "16"),
        ("PATCH_STRIDE", 14, "16"),
        ("PATCH_STRIDE", 16.0, "16"),
        ("IMAGE_SIZE", 225, "multiples of the patch size 16"),
        ("IMAGE_SIZE", [224], r"\[h, w\]"),
        ("GLOBAL_BLOCKS", [12], r"0\.\.11"),
        ("GLOBAL_BLOCKS", 3, "a list"),
        ("TILE_POS_EMBED", "yes", "True or False"),
        ("COMPILE", 1, "True or False"),
        ("RESCALE_COORDS", 0.5, "1 or more"),
        ("RESCALE_COORDS", "2", "None .off."),
        ("RESCALE_COORDS", float("nan"), "1 or more"),
        ("DROP_PATH_RATE", 1.5, "0 or more, below 1"),
        ("DROP_PATH_RATE", False, "0 or more, below 1"),
        ("DROP_PATH_RATE", float("nan"), "0 or more, below 1"),
    ],
)
def test_wrong_switches_name_key_and_allowed_values(detector_cfg, key, value, allowed):
    detector_cfg.MODEL.ROPE_VIT[key] = value
    with pytest.raises(InputError, match=rf"MODEL\.ROPE_VIT\.{key} is .*allowed: .*{allowed}"):
        build_model(detector_cfg)


@pytest.mark.parametrize("name", ["build_rope_vit_backbone", "build_rope_vit_sfp_backbone"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.pop("ROPE_VIT"), r"call rope_vit_det\.add_rope_vit_config\(cfg\)"),
        (lambda model: model.ROPE_VIT.update(NAME={"a": 1}), r"MODEL\.ROPE_VIT\.NAME is {'a': 1}"),
    ],
)
def test_every_backbone_checks_before_it_reads(detector_cfg, name, spoil, message):
    detector_cfg.MODEL.BACKBONE.NAME = name
    spoil(detector_cfg.MODEL)
    with pytest.raises(InputError, match=message):
        build_backbone(detector_cfg)


@pytest.mark.parametrize(("blocks", "warns"), [(None, True), ([3], False), ([], False)])
def test_windows_that_no_block_has_are_told(detector_cfg, caplog, blocks, warns):
    """Of four blocks, each is the last one of a quarter."""
    options = detector_cfg.MODEL.ROPE_VIT
    options.NAME, options.WINDOW_SIZE = "rope_vit_reg4_demo16", 8
    options.GLOBAL_BLOCKS = blocks
    build_backbone(detector_cfg)
    assert ("WINDOW_SIZE (8) changes nothing: all 4 blocks are global" in caplog.text) is warns
    caplog.clear()
    create_backbone(options.NAME, window_size=8, global_blocks=blocks)  # as a LazyConfig does
    assert ("changes nothing" in caplog.text) is warns


@pytest.mark.parametrize(
    ("recipe", "device", "compiles"),
    [(RECIPE, "cuda", True), (RECIPE, "cpu", False), (DEMO_CONFIG, "cuda", False)],
)
def test_recipes_compile_on_gpus_alone(recipe, device, compiles):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(recipe))
    cfg.MODEL.ROPE_VIT.NAME, cfg.MODEL.DEVICE = "rope_vit_reg4_demo16", device
    assert build_backbone(cfg).net.compiled is compiles


@pytest.mark.parametrize("value", ["336", "[336, 224]", "None"])
def test_image_size_takes_a_side_or_both_from_the_command_line(detector_cfg, value):
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_t14"
    detector_cfg.merge_from_list(["MODEL.ROPE_VIT.IMAGE_SIZE", value])
    table = build_model(detector_cfg).backbone.net.pos_embedding
    cells = {"336": 24 * 24, "[336, 224]": 24 * 16, "None": 16 * 16}[value]
    assert table.shape[1] == 1 + cells


def test_a_checkpoint_comes_back_through_detectron2s_own_checkpointer(detector_cfg, tmp_path):
    first, second = build_model(detector_cfg).eval(), build_model(detector_cfg).eval()
    DetectionCheckpointer(first, str(tmp_path)).save("model")
    DetectionCheckpointer(second).load(str(tmp_path / "model.pth"))
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert relative_difference(second.backbone(x)["p3"], first.backbone(x)["p3"]) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("backbone.net.encoder.block.3.attn.qkv.weight"), "has 148 of the 149"),
        (lambda s: [s.pop(k) for k in list(s) if ".net." in k], "has none of the 149"),
        # Detectron2 drops what has another shape, and only then asks the model to load.
        (
            lambda s: s.update({"backbone.net.pos_embedding": torch.zeros(1, 5, 192)}),
            "has 148 of the 149.*pos_embedding.*IMAGE_SIZE",
        ),
    ],
)
def test_half_a_backbone_is_an_error_in_any_script(detector_cfg, tmp_path, damage, message):
    model = build_model(detector_cfg)
    state = dict(model.state_dict())
    damage(state)
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=message):
        DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))

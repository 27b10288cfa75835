"""Configs filled from weights, and compared with them."""

from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN

from rope_vit_det import add_rope_vit_config, use_rope_vit
from rope_vit_det.config.use import compared_settings, disagreement
from rope_vit_det.errors import InputError
from rope_vit_det.weights import read_weights_file

ZOO = Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).parents[1]
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def _zoo(name):
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name), allow_unsafe=True)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        (MASK_RCNN, "build_rope_vit_sfp_backbone"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "build_retinanet_rope_vit_sfp_backbone"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "build_rope_vit_sfp_backbone"),
    ],
)
def test_it_fills_a_zoo_config_from_a_file(birder_file, name, builder):
    path, _ = birder_file(size=(256, 256), config={"pt_grid_size": [16, 16]})
    cfg = _zoo(name)
    cfg.freeze()
    use_rope_vit(cfg, weights=str(path))
    assert cfg.is_frozen()
    assert builder == cfg.MODEL.BACKBONE.NAME
    assert f"birder:{path}" == cfg.MODEL.WEIGHTS
    assert cfg.MODEL.ROPE_VIT.NAME == "rope_vit_reg1_t16"
    assert cfg.MODEL.ROPE_VIT.IMAGE_SIZE == 256
    assert cfg.MODEL.ROPE_VIT.PT_GRID_SIZE == [16, 16]
    assert cfg.INPUT.FORMAT == "RGB"
    assert pytest.approx([127.5, 114.75, 102.0]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([63.75, 61.2, 58.65]) == cfg.MODEL.PIXEL_STD
    DetectionCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)
    assert disagreement(compared_settings(cfg), read_weights_file(path)[1]) is None


def test_it_downloads_a_published_name(published):
    from rope_vit_det.weights.hub import cache_folder

    entry, content = published
    (cache_folder("weights") / entry.file_name).write_bytes(content)
    for weights in (entry.name, "birder://" + entry.name):
        cfg = _zoo(MASK_RCNN)
        use_rope_vit(cfg, weights)
        assert "birder://" + entry.name == cfg.MODEL.WEIGHTS
        assert pytest.approx([127.5, 114.75, 102.0]) == cfg.MODEL.PIXEL_MEAN


def test_without_weights_and_with_a_detectors():
    cfg = _zoo(MASK_RCNN)
    use_rope_vit(cfg, network="rope_vit_t16")
    assert cfg.MODEL.WEIGHTS == "" and cfg.MODEL.ROPE_VIT.NAME == "rope_vit_t16"
    use_rope_vit(cfg, "model_final.pth")
    assert cfg.MODEL.WEIGHTS == "model_final.pth"


def test_a_config_without_pyramid_is_refused_and_unchanged():
    cfg = _zoo("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    before = cfg.dump()
    with pytest.raises(InputError, match=r"MODEL.RPN.IN_FEATURES \['res4'\].*FPN"):
        use_rope_vit(cfg)
    assert cfg.dump() == before


def test_an_unknown_network_is_refused_and_the_config_unchanged():
    cfg = _zoo(MASK_RCNN)
    cfg.freeze()
    before = cfg.dump()
    with pytest.raises(InputError, match=r"unknown network 'vit_base_dinov3'.*did you mean"):
        use_rope_vit(cfg, network="vit_base_dinov3")
    assert cfg.dump() == before and cfg.is_frozen()


@pytest.mark.parametrize("name", ["RRPN", "FastRPN", "OwnRPN"])
def test_a_subclass_of_rpn_reads_what_rpn_reads(name, monkeypatch):
    known = PROPOSAL_GENERATOR_REGISTRY._obj_map
    monkeypatch.setitem(known, "OwnRPN", type("OwnRPN", (RPN,), {}))
    cfg = _zoo(MASK_RCNN)
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
    use_rope_vit(cfg, network="rope_vit_t16")
    assert cfg.MODEL.BACKBONE.NAME == "build_retinanet_rope_vit_sfp_backbone"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("INPUT.FORMAT", "BGR", "set INPUT.FORMAT RGB"),
        ("MODEL.PIXEL_MEAN", [102, 114, 127], "set MODEL.PIXEL_MEAN '[127.5, 114.75, 102.0]'"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "set MODEL.PIXEL_STD '[63.75, 61.2, 58.65]'"),
        ("MODEL.ROPE_VIT.NAME", "rope_vit_t16", "set MODEL.ROPE_VIT.NAME rope_vit_reg1_t16"),
        ("MODEL.ROPE_VIT.IMAGE_SIZE", 336, "set MODEL.ROPE_VIT.IMAGE_SIZE 224"),
        ("MODEL.ROPE_VIT.PT_GRID_SIZE", None, "set MODEL.ROPE_VIT.PT_GRID_SIZE '[16, 16]'"),
        ("MODEL.ROPE_VIT.PT_GRID_SIZE", "count", "set MODEL.ROPE_VIT.PT_GRID_SIZE '[16, 16]'"),
        ("MODEL.PIXEL_MEAN", [127.4, 114.8, 102.0], None),
        ("MODEL.ROPE_VIT.IMAGE_SIZE", None, None),
        ("MODEL.ROPE_VIT.IMAGE_SIZE", [224, 224], None),
        ("MODEL.ROPE_VIT.PT_GRID_SIZE", (16, 16), None),
    ],
)  # fmt: skip
def test_a_disagreement_is_named_with_what_to_set(birder_file, key, value, told):
    path, _ = birder_file(config={"pt_grid_size": [16, 16]})
    cfg = _zoo(MASK_RCNN)
    add_rope_vit_config(cfg)
    use_rope_vit(cfg, str(path))
    *nodes, last = key.split(".")
    node = cfg
    for name in nodes:
        node = node[name]
    node[last] = value
    assert disagreement(compared_settings(cfg), read_weights_file(path)[1]) == told


def test_a_config_in_the_file_that_no_key_can_follow(birder_file):
    path, _ = birder_file(
        config={"rope_temperature": 50.0, "drop_path_rate": 0.4, "pre_norm": False}
    )
    cfg = _zoo(MASK_RCNN)
    use_rope_vit(cfg, str(path))
    told = disagreement(compared_settings(cfg), read_weights_file(path)[1])
    assert (
        told == "they have rope_temperature 50.0, rope_vit_reg1_t16 has 100.0, and no key sets it"
    )


@pytest.mark.parametrize(
    ("weights", "batch", "rate", "decay"),
    [("a.pth", 64, 1e-4, 0.7), ("a.pth", 16, 5e-5, 0.7), (None, 16, 1.5e-4, 1.0)],
)
def test_it_sets_the_solver_for_the_batch_and_says_so(caplog, weights, batch, rate, decay):
    cfg = _zoo(MASK_RCNN)
    cfg.SOLVER.IMS_PER_BATCH = batch
    schedule = (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.AMP.ENABLED)
    with caplog.at_level("WARNING", logger="rope_vit_det.config.use"):
        use_rope_vit(cfg, weights)
    solver = cfg.SOLVER
    assert rate == solver.BASE_LR and decay == solver.LAYER_DECAY
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.WARMUP_ITERS) == ("AdamW", 0.1, 250)
    assert schedule == (solver.STEPS, solver.MAX_ITER, solver.AMP.ENABLED)
    assert len(caplog.records) == 1 and f"SOLVER.BASE_LR {rate}" in caplog.text


def test_a_switch_leaves_the_solver_alone(caplog):
    cfg = _zoo(MASK_RCNN)
    add_rope_vit_config(cfg)
    before = cfg.SOLVER.dump()
    use_rope_vit(cfg, solver=False)
    assert cfg.SOLVER.dump() == before and not caplog.records

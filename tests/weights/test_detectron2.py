"""birder:// in Detectron2's own checkpointer, predictor, trainer and lazy configs."""

import os
import subprocess
import sys

import pytest
import torch
from birder.model_registry import registry
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import SimpleFeaturePyramid, build_model
from helpers import birders_weights, relative_difference

from rope_vit_det.backbone import RoPEViTBackbone, load_logger
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError
from rope_vit_det.models import VARIANTS, create_model
from rope_vit_det.weights.detectron2_format import detectron2_checkpoint
from rope_vit_det.weights.info import HEAD_PREFIXES

BIRDS_PIXELS = ("INPUT.FORMAT RGB", "MODEL.PIXEL_MEAN '[127.5, 114.75, 102.0]'")


@pytest.fixture
def cfg(detector_cfg):
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg1_t16"
    return detector_cfg


def _neck_agrees(model, net):
    x = torch.randn(1, 3, 224, 224)
    theirs = net.detection_features(x)["stage1"]
    assert relative_difference(model.backbone.net(x)["neck"], theirs) < 1e-5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "builder",
    [
        "build_rope_vit_sfp_backbone",
        "build_retinanet_rope_vit_sfp_backbone",
        "build_rope_vit_backbone",
    ],
)
def test_detectron2s_own_checkpointer(cfg, birder_file, caplog, suffix, builder):
    path, net = birder_file(suffix=suffix)
    cfg.MODEL.BACKBONE.NAME = builder
    if builder != "build_rope_vit_sfp_backbone":
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        only_neck = builder == "build_rope_vit_backbone"
        levels = ["neck"] if only_neck else ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.RETINANET.IN_FEATURES = levels
        if only_neck:
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[64]]
    model = build_model(cfg).eval()
    with caplog.at_level("INFO", logger=load_logger.name):
        load_logger.addHandler(caplog.handler)
        DetectionCheckpointer(model).load(f"birder:{path}")
        load_logger.removeHandler(caplog.handler)
    assert f"Loaded 149 of 149 backbone tensors from birder:{path}" in caplog.text
    _neck_agrees(model, net)


def test_a_published_name_in_the_predictor(cfg, published, cache):
    from rope_vit_det.weights.hub import cache_folder

    entry, content = published
    (cache_folder("weights") / entry.file_name).write_bytes(content)
    cfg.MODEL.WEIGHTS = "birder://" + entry.name
    predictor = DefaultPredictor(cfg)
    state = torch.load(cache_folder("weights") / entry.file_name, weights_only=True)["state"]
    loaded = predictor.model.backbone.net.state_dict()
    assert loaded.keys() == {k for k in state if not k.startswith(HEAD_PREFIXES)}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.parametrize("network", sorted({e.network for e in birders_weights().values()}))
def test_exactly_the_head_is_left_out(network):
    """For every published network, as birder has it."""
    with torch.device("meta"):
        net = registry.net_factory(network, 5, 3)
        ours = create_model(network, image_size=net.size, cls=RoPEViTBackbone)
    theirs = {k for k in net.state_dict() if not k.startswith(HEAD_PREFIXES)}
    assert ours.state_dict().keys() == theirs
    assert network in VARIANTS


def test_lazy_configs(birder_file):
    path, net = birder_file()
    backbone = LazyCall(SimpleFeaturePyramid)(
        net=LazyCall(create_model)(name="rope_vit_reg1_t16", patch_stride=16, cls=RoPEViTBackbone),
        in_feature="neck",
        out_channels=64,
        scale_factors=(2.0, 1.0),
    )
    model = torch.nn.Module()
    model.backbone = instantiate(backbone)
    DetectionCheckpointer(model.eval()).load(f"birder:{path}")
    _neck_agrees(model, net)


SCRIPT = """
import torch, sys
import rope_vit_det
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils.logger import setup_logger

cfg = get_cfg()
rope_vit_det.add_rope_vit_config(cfg)
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
cfg.MODEL.BACKBONE.NAME = "build_rope_vit_sfp_backbone"
cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg1_t16"
cfg.MODEL.WEIGHTS = sys.argv[1]
cfg.MODEL.DEVICE = "cpu"
cfg.OUTPUT_DIR = "out"
cfg.DATALOADER.NUM_WORKERS = 0
box = {"bbox": [1, 1, 50, 50], "bbox_mode": 0, "category_id": 0}
image = {"file_name": "x.png", "image_id": 0, "height": 60, "width": 60, "annotations": [box]}
DatasetCatalog.register("one", lambda: [image])
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("one",), ()
setup_logger()
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
torch.save(trainer.model.backbone.net.state_dict(), "loaded.pth")
"""


def test_a_script_of_detectron2s_in_a_fresh_process(birder_file, tmp_path):
    path, net = birder_file()
    (tmp_path / "script.py").write_text(SCRIPT)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py", f"birder:{path}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "Loaded 149 of 149 backbone tensors" in answer.stdout
    # The zoo's pixels are not birder's, which is said, with what to set.
    for line in BIRDS_PIXELS:
        assert line in answer.stdout
    loaded = torch.load(tmp_path / "loaded.pth")
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in loaded.items())


def test_another_size_names_the_lines_to_set(cfg, birder_file):
    path, _ = birder_file(size=(336, 224))
    told = r"set MODEL.ROPE_VIT.NAME rope_vit_reg1_t16 MODEL.ROPE_VIT.IMAGE_SIZE '\[336, 224\]'"
    for checkpointer in (DetectionCheckpointer, DetectorCheckpointer):
        with pytest.raises(InputError, match=told):
            checkpointer(build_model(cfg)).load(f"birder:{path}")
    cfg.MODEL.ROPE_VIT.IMAGE_SIZE = [336, 224]
    DetectionCheckpointer(build_model(cfg)).load(f"birder:{path}")


def test_another_network_is_an_error(cfg, birder_file):
    path, _ = birder_file("rope_vit_reg1_s16")
    with pytest.raises(InputError, match=r"set MODEL.ROPE_VIT.NAME rope_vit_reg1_s16"):
        DetectionCheckpointer(build_model(cfg)).load(f"birder:{path}")


@pytest.mark.parametrize("name", ["model.pt", "with space.pt", "what?.pt", "100%25.pt", "a#b.pt"])
def test_any_file_name_and_a_plain_path_in_our_checkpointer(cfg, birder_file, name):
    """The config says which network it is."""
    path, net = birder_file()
    path = path.rename(path.with_name(name))
    model = build_model(cfg).eval()
    DetectorCheckpointer(model).load(str(path))
    _neck_agrees(model, net)


def test_the_cache_follows_the_file(birder_file):
    path, _ = birder_file()
    first = detectron2_checkpoint(f"birder:{path}")
    before = first.stat().st_mtime_ns
    assert detectron2_checkpoint(f"birder:{path}") == first
    assert first.stat().st_mtime_ns == before
    times = path.stat()
    content = torch.load(path, weights_only=True)
    content["state"]["class_token"] += 1
    torch.save(content, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = detectron2_checkpoint(f"birder:{path}")
    key = "backbone.net.class_token"
    a, b = (torch.load(p, weights_only=True)["model"][key] for p in (first, second))
    assert torch.allclose(a + 1, b)


def test_a_whole_detector_needs_no_backbone_file(cfg, birder_file, tmp_path):
    path, net = birder_file()
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).load(f"birder:{path}")
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    path.unlink()
    again = build_model(cfg).eval()
    DetectorCheckpointer(again).load(str(tmp_path / "model.pth"))
    _neck_agrees(again, net)


def test_missing_files_and_names(cfg):
    model = build_model(cfg)
    for checkpointer in (DetectionCheckpointer(model), DetectorCheckpointer(model)):
        with pytest.raises(InputError, match=r"nowhere\.pt: no such file"):
            checkpointer.load("birder:/nowhere.pt")
    with pytest.raises(InputError, match=r"no weights are published as 'nothing'"):
        DetectorCheckpointer(model).load("birder://nothing")

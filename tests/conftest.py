"""What several tests need: moved-off-initial networks, small detector configs."""

import ctypes
import gc
import importlib.util
import logging
import os
import re
from pathlib import Path

import pytest
import stand_in as stand_in_dataset
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from helpers import DEMO_CONFIG
from hub_server import cache  # noqa: F401 (a fixture)
from hypothesis import settings
from known_results import KnownResults, make_known_results

from projects.benchmark.measure import resident_mib
from projects.benchmark.networks import spare_birder_polars
from rope_vit_det import add_rope_vit_config
from rope_vit_det.data.demo import dataset as demo
from rope_vit_det.data.demo.shapes import CATEGORIES

spare_birder_polars()
if importlib.util.find_spec("birder"):
    from birder_files import birder_file, birder_output, published
else:  # make test-lowest: its own bounds are higher than ours

    @pytest.fixture
    def birder_file():
        pytest.importorskip("birder")

    published = birder_output = birder_file

# What the tests import that a machine may lack, as one without a network; see _skip_without_peers.
PEERS = ("birder", "faster_coco_eval", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino",
         "sahi", "supervision", "timm", "transformers", "twine")  # fmt: skip
_ABSENT = [name for name in PEERS if importlib.util.find_spec(name) is None]
_LACKS = re.compile(
    rf"(?:No module named '|pip install |No package metadata was found for )"
    rf"({'|'.join(_ABSENT)})\b"
)


def pytest_configure(config):
    """Hides GPUs: most tests compare bits of the CPU, and those of tests/gpu are run by name."""
    folder = Path(__file__).parent / "gpu"
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if not all(folder in (path, *path.parents) for path in asked):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _skip_without_peers((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _skip_without_peers((yield), item.path)


def _skip_without_peers(report, path):
    """A failure for want of a package that is not installed is a skip which names it."""
    lacking = _ABSENT and report.failed and _LACKS.search(str(report.longrepr))
    if lacking:
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: {lacking[1]} is not installed")
    return report


def pytest_collection_finish():
    """What the imports have made stays: the collector need not look at it after every test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else libraries report at the end what they take for leaks


def pytest_runtest_logfinish():
    """Gives memory back: a worker lives for minutes, and what it has freed stays its own."""
    global _kept
    resident = resident_mib()
    if resident > _kept + 100:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _kept = resident_mib()
    _kept = min(_kept, resident)


_kept = 0.0

# The same few examples each time in `make test`; many, and others each time, in `make test-slow`.
settings.register_profile("fast", max_examples=5, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=400, deadline=None, print_blob=True)
settings.load_profile("fast")


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process():
    torch.manual_seed(0)
    # A run in this process takes the loggers for itself; `caplog` would hear nothing.
    for name in ("detectron2", "fvcore", "rope_vit_det"):
        logging.getLogger(name).propagate = True


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


@pytest.fixture(scope="session")
def small_demo_dataset(tmp_path_factory) -> Path:
    """The first images of the demo's dataset, in a folder that DETECTRON2_DATASETS can name."""
    root = tmp_path_factory.mktemp("datasets") / "rope_vit_det_demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SPLITS", {"train": 8, "val": 4})
        demo.generate_demo_dataset(root)
    return root


@pytest.fixture(scope="session")
def detector_state() -> dict[str, torch.Tensor]:
    """The state dict of the demo's detector, with random weights."""
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    return build_model(cfg).state_dict()


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory, detector_state) -> Path:
    """What a training of the demo's detector leaves, with random weights, and for small images."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 128
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (64,), 128
    (folder / "config.yaml").write_text(cfg.dump())
    classes = {"names": list(CATEGORIES), "ids": [1, 2, 3, 4]}
    torch.save({"model": detector_state, "classes": classes}, folder / "model_final.pth")
    return folder


@pytest.fixture(scope="session")
def known_results(small_demo_dataset, trained_folder) -> KnownResults:
    """Results with known mistakes, in `trained_folder`'s inference/; see known_results.py."""
    file = trained_folder / "inference" / "coco_instances_results.json"
    return make_known_results(small_demo_dataset, file)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> str:
    """The name of a registered dataset that stands in for the big ones; see stand_in.py."""
    stand_in_dataset.register_stand_in(tmp_path_factory.mktemp("stand_in"))
    yield stand_in_dataset.NAME
    stand_in_dataset.unregister_stand_in()

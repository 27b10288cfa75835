"""Detectors on a GPU: a step in half precision, TTA, a training, its kill, its export."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from helpers import REHEARSED, detector_input, move_off_initial_values, relative_difference

from rope_vit_det.engine.train_step import build_train_step
from rope_vit_det.prediction import Predictor
from rope_vit_det.solver.optimizers import build_optimizer

ROOT = Path(__file__).parents[2]
TINY = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "128", "INPUT.MIN_SIZE_TEST", "64")
ITERATIONS = 12 if REHEARSED else 240


@pytest.fixture
def cfg(detector_cfg, device):
    """A Mask R-CNN with windows that finds something with random weights."""
    detector_cfg.MODEL.DEVICE = device.type
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg4_demo16"
    detector_cfg.MODEL.ROPE_VIT.WINDOW_SIZE = 6
    detector_cfg.MODEL.ROPE_VIT.GLOBAL_BLOCKS = [3]
    detector_cfg.MODEL.FPN.OUT_CHANNELS = 32
    detector_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    detector_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    detector_cfg.TEST.DETECTIONS_PER_IMAGE = 30
    detector_cfg.TEST.AUG.MIN_SIZES = (128, 180)
    detector_cfg.TEST.AUG.MAX_SIZE = 400
    return detector_cfg


def test_augmentation_finds_what_it_finds_on_the_cpu(cfg, exact):
    model = move_off_initial_values(build_model(cfg))
    image = detector_input(200, 270)
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model, batch_size=1)([image])[0]["instances"].to("cpu")
        expected = GeneralizedRCNNWithTTA(cfg, model.cpu(), batch_size=1)([image])[0]["instances"]
    assert len(found) == len(expected) == 30
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=1e-2)
    # One pair at the threshold of NMS may fall either way.
    overlap = pairwise_iou(found.pred_boxes, expected.pred_boxes)
    same = (overlap > 0.99) & (found.pred_classes[:, None] == expected.pred_classes[None])
    assert same.any(dim=1).sum() >= 27
    masks = [(each.pred_masks.float().mean(), each.pred_masks.shape) for each in (found, expected)]
    assert masks[0][1] == masks[1][1] == (30, 200, 270)
    assert abs(masks[0][0] - masks[1][0]) < 0.01


def test_losses_are_those_of_detectron2s_parts(cfg, exact):
    """Of all anchors and proposals, so that nothing is drawn at random."""
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**5
    cfg.MODEL.RPN.POSITIVE_FRACTION = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    images = [detector_input(*size) for size in ((128, 192), (160, 96))]
    images[1]["instances"] = images[1]["instances"][:0]
    theirs = build_model(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FastRPN"
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_MASK_HEAD.NAME = "FastROIHeads", "FastMaskHead"
    ours = build_model(cfg)
    ours.load_state_dict(theirs.state_dict())
    with EventStorage():
        found, expected = (each.train()(copy.deepcopy(images)) for each in (ours, theirs))
    assert found.keys() == expected.keys()
    # A pair of boxes at the threshold of NMS may fall either way.
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-2), name


@pytest.mark.parametrize("compiled", [False, True])
def test_sizes_that_repeat_give_what_they_gave(cfg, exact, monkeypatch, compiled):
    """CUDA graphs of several sizes by turns; with weights that change, and training in between."""
    if not compiled:  # the graphs alone, without minutes of compiling
        monkeypatch.setattr(torch, "compile", lambda block, **kwargs: block)
    cfg.MODEL.ROPE_VIT.COMPILE = True
    model = move_off_initial_values(build_model(cfg)).eval()
    plain = copy.deepcopy(model).backbone
    plain.net.compiled = False
    images = [
        torch.randn(n, 3, *size, device=model.device)
        for n, size in ((1, (128, 192)), (1, (96, 160)), (2, (128, 192)))
    ][: 1 if compiled else 3]

    def compare(bound=1e-4, autocast=False):
        enabled = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast)
        for _ in range(3):
            found = []
            for x in images:
                with torch.no_grad(), enabled:
                    found.append((model.backbone(x + 1), plain(x + 1)))
            for ours, expected in found:  # after the others have been replayed
                assert ours.keys() == expected.keys()
                for name, y in expected.items():
                    assert relative_difference(ours[name].float(), y.float()) < bound, name

    compare()
    compare(0.1, autocast=True)
    captured = [each for each in model.backbone._replayed._graphs.values() if each]
    assert len(captured) == (0 if REHEARSED else 2 * len(images))
    for each in (model.backbone, plain):  # where they lie, as a training and an average do
        with torch.no_grad():
            each.net.conv_proj.weight.mul_(1.1)
    compare()
    with EventStorage():
        model.train()([detector_input(128, 192)])
    assert not model.backbone._replayed._graphs
    model.eval()
    for each in (model.backbone, plain):
        each.load_state_dict({k: v * 1.1 for k, v in each.state_dict().items()}, assign=True)
        each.net.pt_grid_size = (6, 6)
    compare()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_in_half_precision_moves_every_weight(cfg, dtype):
    if dtype == "float16" and REHEARSED:
        pytest.skip("float16 is for GPUs")
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, dtype
    cfg.SEED, cfg.SOLVER.BASE_LR = 3, 1e-4
    steps = 12  # the first ones of float16 may find a scale that is too large
    model = build_model(cfg).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step = build_train_step(
        cfg, model, iter([[detector_input(128, 192)]] * steps), build_optimizer(cfg, model)
    )
    with EventStorage() as storage:
        for step.iter in range(steps):
            step.run_step()
        assert np.isfinite(storage.latest()["total_loss"][0])
    moved = {k for k, p in model.named_parameters() if not torch.equal(p.detach(), before[k])}
    trained = {k for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert trained <= moved


@pytest.fixture(scope="module")
def start(device, small_demo_dataset, tmp_path_factory):
    """Starts a tool on the demo's first images; its output goes to a file."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
        "PYTHONPATH": str(ROOT),
    }
    started = []

    def start(tool, *arguments):
        printed = folder / f"{len(started)}.txt"
        with open(printed, "w") as file:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", ROOT / "tools" / tool, *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        process.printed = printed.read_text
        started.append(process)
        return process

    start.folder = folder
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _end(process):
    assert process.wait(timeout=300) == 0, process.printed()[-3000:]


def _train(start, device, output, iterations, *opts):
    config = ("--config-file", ROOT / "configs" / "demo.yaml")
    fixed = ("MODEL.DEVICE", device.type, "OUTPUT_DIR", output, "TEST.EVAL_PERIOD", "0")
    fixed += ("SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", iterations // 8)
    fixed += TINY if REHEARSED else ()
    return start("train_net.py", *config, *opts, *fixed)


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def _steps_taken(folder):
    """Of each weight, by the optimizer's own count."""
    state = torch.load(folder / "model_final.pth", weights_only=False, map_location="cpu")
    return {
        int(each["step"]) for each in state["trainer"]["_trainer"]["optimizer"]["state"].values()
    }


@pytest.fixture(scope="module")
def trained(start, device):
    """The demo's detector that learned its few images, rehearsal and evaluation included."""
    test = ("DATASETS.TEST", "('rope_vit_det_demo_train',)")
    _end(_train(start, device, "out", ITERATIONS, *test))
    return start.folder / "out"


def test_the_demo_learns(trained):
    rows = _metrics(trained)
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert np.isfinite(losses).all()
    if not REHEARSED:
        assert losses[-1] < 0.7 * losses[0]
        assert rows[-1]["bbox/AP50"] > 10 and rows[-1]["segm/AP50"] > 10
    assert _steps_taken(trained) == {ITERATIONS}


def test_a_killed_run_goes_on(start, device):
    """Its optimizer has taken every step once, and half-written files are gone."""
    output, end = start.folder / "cut", 16
    opts = ("SOLVER.CHECKPOINT_PERIOD", 4)
    process = _train(start, device, "cut", end, "--no-rehearsal", *opts)
    limit = time.monotonic() + 120
    while not (output / "model_0000007.pth").exists():
        assert process.poll() is None and time.monotonic() < limit, process.printed()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = _train(start, device, "cut", end, "--no-rehearsal", "--resume", *opts)
    _end(resumed)
    assert "Starting training from iteration 0" not in resumed.printed()
    assert _steps_taken(output) == {end}
    assert not list(output.glob(".model_*.tmp"))


def test_a_model_trained_here_is_exported_and_predicts_as_on_the_cpu(
    start, trained, device, exact, small_demo_dataset
):
    exported = trained / "backbone.pt2"
    _end(start("export_model.py", trained, exported))
    images = torch.rand(1, 3, 320, 352) * 255
    features = torch.export.load(exported).module()(images)
    features = features if isinstance(features, dict) else dict(enumerate(features))
    assert all(torch.isfinite(each).all() for each in features.values())

    image = min((small_demo_dataset / "val").rglob("*.jpg"))
    opts = ("INPUT.MIN_SIZE_TEST", "64") if REHEARSED else ()
    found, expected = (
        Predictor(trained, device=where, opts=opts, threshold=0.05)(image)
        for where in (device, "cpu")
    )
    assert abs(len(found) - len(expected)) <= 2
    if len(expected) and len(found) == len(expected):
        torch.testing.assert_close(found.scores, expected.scores, atol=0.02, rtol=0.05)

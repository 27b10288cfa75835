"""Whole detectors: multi-scale training, test-time augmentation, extreme sizes, COMPILE."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeTransform
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils.events import EventStorage
from helpers import detector_input, move_off_initial_values, relative_difference


@pytest.fixture
def cfg(detector_cfg) -> CfgNode:
    """A Mask R-CNN with windows that finds something with random weights."""
    detector_cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg4_demo16"
    detector_cfg.MODEL.ROPE_VIT.WINDOW_SIZE = 6
    detector_cfg.MODEL.ROPE_VIT.GLOBAL_BLOCKS = [3]
    detector_cfg.MODEL.FPN.OUT_CHANNELS = 32
    detector_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    detector_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    detector_cfg.TEST.DETECTIONS_PER_IMAGE = 30
    detector_cfg.TEST.AUG.MIN_SIZES = (128, 180, 260)
    detector_cfg.TEST.AUG.MAX_SIZE = 400
    return detector_cfg


@torch.no_grad()
def _detect(model, images):
    return [out["instances"] for out in model(images)]


@pytest.mark.parametrize("pt_grid_size", [pytest.param(None, marks=pytest.mark.slow), [16, 16]])
def test_augmentation_over_scales_and_flips(cfg, pt_grid_size):
    """The union of what the detector finds in each view, without duplicates."""
    cfg.MODEL.ROPE_VIT.PT_GRID_SIZE = pt_grid_size
    model = move_off_initial_values(build_model(cfg))
    image = detector_input(200, 270)
    augmented = GeneralizedRCNNWithTTA(cfg, model, batch_size=1)
    with torch.no_grad():
        found = augmented([image])[0]["instances"]

    boxes, scores, classes = [], [], []
    fresh = copy.deepcopy(model)  # without the tables of other sizes
    for side in cfg.TEST.AUG.MIN_SIZES:
        scale = side / 200
        resize = ResizeTransform(200, 270, side, int(270 * scale + 0.5))
        pixels = resize.apply_image(image["image"].permute(1, 2, 0).numpy())
        for flipped in (False, True):
            view = np.array(pixels[:, ::-1] if flipped else pixels)
            view = torch.from_numpy(view).permute(2, 0, 1)
            height, width = view.shape[1:]
            out = _detect(fresh, [{"image": view, "height": height, "width": width}])[0]
            own = out.pred_boxes.tensor.clone()
            if flipped:
                own[:, [0, 2]] = width - own[:, [2, 0]]
            boxes.append(own * torch.tensor([270 / width, 200 / height] * 2))
            scores.append(out.scores)
            classes.append(out.pred_classes)
    boxes, scores, classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    boxes[:, 0::2].clamp_(0, 270), boxes[:, 1::2].clamp_(0, 200)
    keep = batched_nms(boxes, scores, classes, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)[:30]
    assert len(found) == len(keep) == 30
    torch.testing.assert_close(found.scores, scores[keep], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[keep], rtol=1e-3, atol=0.05)
    assert torch.equal(found.pred_classes, classes[keep])
    assert found.pred_masks.shape == (30, 200, 270) and found.pred_masks.any()


def test_augmentation_with_the_image_itself_changes_nothing(cfg):
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (200,), False
    model = move_off_initial_values(build_model(cfg))
    image = detector_input(200, 270)
    expected = _detect(model, [image])[0]
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([image])[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.pred_masks, expected.pred_masks)


def test_training_on_rectangles_of_many_scales(cfg):
    """Each step has the gradients of a detector that has never seen another size."""
    cfg.MODEL.ROPE_VIT.ACTIVATION_CHECKPOINT = True
    model = build_model(cfg).train()
    first = model.state_dict()
    for sizes in [[(64, 150), (100, 70)], [(33, 290)], [(160, 48)]]:
        batch = [detector_input(*size) for size in sizes]
        grads = []
        for detector in (model, copy.deepcopy(model)):
            detector.zero_grad()
            torch.manual_seed(5)
            with EventStorage():
                losses = detector(copy.deepcopy(batch))
            assert all(loss.isfinite() for loss in losses.values()), sizes
            sum(losses.values()).backward()
            grads.append({k: p.grad for k, p in detector.named_parameters()})
        for key, grad in grads[0].items():
            assert grad is not None, key
            if key.startswith("backbone.net."):
                assert relative_difference(grad, grads[1][key]) < 1e-4, (sizes, key)
    assert list(model.state_dict()) == list(first)


@pytest.mark.parametrize("size", [(1, 1), (9, 11), (8, 300), (31, 33)])
def test_images_below_one_patch_are_padded(cfg, size):
    cfg.MODEL.ROPE_VIT.TILE_POS_EMBED = True
    model = move_off_initial_values(build_model(cfg))
    out = _detect(model, [{"image": torch.zeros(3, *size, dtype=torch.uint8)}])[0]
    assert out.image_size == size


@pytest.mark.slow
def test_one_detector_from_64_to_2048_pixels(cfg):
    model = move_off_initial_values(build_model(cfg))
    for size in [(64, 64), (2048, 2048), (1216, 800), (64, 2048)]:
        image = detector_input(*size)
        found, expected = _detect(model, [image])[0], _detect(copy.deepcopy(model), [image])[0]
        assert found.image_size == size
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_detector_trains_detects_and_is_augmented(cfg, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k, backend="aot_eager"))
    torch._dynamo.reset()
    eager = move_off_initial_values(build_model(cfg))
    model = build_model(cfg)
    model.backbone.net.compiled = True  # which COMPILE does for GPUs alone
    model.load_state_dict(eager.state_dict())
    batch = [detector_input(150, 200), detector_input(180, 120)]
    losses = []
    for detector in (eager, model):
        detector.train()
        torch.manual_seed(5)
        with EventStorage():
            losses.append(detector(copy.deepcopy(batch)))
        sum(losses[-1].values()).backward()
        detector.eval()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for (key, a), b in zip(eager.named_parameters(), model.parameters(), strict=True):
        if key.startswith("backbone.net."):
            assert relative_difference(b.grad, a.grad) < 1e-3, key

    with torch.no_grad():
        expected, found = (
            GeneralizedRCNNWithTTA(cfg, detector)(batch[:1])[0]["instances"]
            for detector in (eager, model)
        )
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)

"""Our parts of Detectron2's detectors against Detectron2's own."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import DEMO_CONFIG, relative_difference
from torchvision.ops import batched_nms

from rope_vit_det import add_rope_vit_config
from rope_vit_det import heads as our_heads
from rope_vit_det.heads import FastLayerNorm, FastPolygonMasks, FastRPN, suppress


@pytest.fixture
def norms():
    theirs = LayerNorm(48)
    torch.nn.init.normal_(theirs.weight, 1.0)
    torch.nn.init.normal_(theirs.bias)
    ours = FastLayerNorm(48)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _with_gradients(norm, x, weights):
    x = x.detach().requires_grad_()
    y = norm(x)
    (y * weights.to(y.dtype)).sum().backward()
    found = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    norm.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(2, 48, 9, 7), (0, 48, 7, 7)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_norm_is_detectron2s(norms, shape, memory):
    ours, theirs = norms
    x = (torch.randn(shape) * 3 + 1).contiguous(memory_format=memory)
    weights = torch.randn(shape)
    pairs = zip(*(_with_gradients(norm, x, weights) for norm in (ours, theirs)), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b) or relative_difference(a, b) < 1e-6


def test_under_autocast_the_norm_is_no_farther_from_float64_than_detectron2s(norms):
    x, weights = torch.randn(2, 48, 16, 16) * 3 + 1, torch.randn(2, 48, 16, 16)
    x = x.bfloat16()
    exact = _with_gradients(copy.deepcopy(norms[1]).double(), x.double(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (_with_gradients(norm, x, weights) for norm in norms)
    for a, b, oracle in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        errors = [(each.double() - oracle).abs().mean() for each in (a, b)]
        # but for the last digits of float32 sums
        assert errors[0] <= errors[1] + 1e-6 * oracle.abs().mean()


def _detector(**names):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
    for key, value in names.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return build_model(cfg)


def test_a_detector_of_our_parts_is_the_one_of_detectron2s():
    theirs = _detector(
        FPN__NORM="LN",
        PROPOSAL_GENERATOR__NAME="RPN",
        ROI_BOX_HEAD__NAME="FastRCNNConvFCHead",
        ROI_BOX_HEAD__NORM="LN",
        ROI_MASK_HEAD__NAME="MaskRCNNConvUpsampleHead",
        ROI_MASK_HEAD__NORM="LN",
    )
    ours = _detector()
    assert not any(type(module).__module__ == our_heads.__name__ for module in theirs.modules())
    used = {type(m).__name__ for m in ours.modules() if type(m).__module__ == our_heads.__name__}
    assert used == {"FastRPN", "FastBoxHead", "FastMaskHead", "FastLayerNorm"}
    assert not any(type(module) is LayerNorm for module in ours.modules())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = {"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}
    target = Instances((96, 128), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 70.0]])))
    target.gt_classes = torch.tensor([1])
    target.gt_masks = PolygonMasks([[[8.0, 8.0, 60.0, 20.0, 30.0, 70.0]]])
    image["instances"] = target
    with EventStorage():
        losses = []
        for detector in (ours, theirs):
            torch.manual_seed(0)
            losses.append(detector([image]))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), rel=1e-4), name


def test_targets_of_polygons_are_detectron2s():
    generator = torch.Generator().manual_seed(0)

    def polygon(corners):
        return (torch.rand(corners, 2, generator=generator) * 60 + 20).flatten().tolist()

    theirs = PolygonMasks([[polygon(3)], [polygon(9), polygon(4), polygon(30)], [polygon(5)]] * 5)
    ours = FastPolygonMasks(theirs.polygons)
    boxes = torch.rand(15, 4, generator=generator) * 30
    boxes[:, 2:] += 40
    boxes[4] = torch.tensor([30.0, 30.0, 30.0, 70.0])  # of no width
    found, oracle = (masks.crop_and_resize(boxes, 28) for masks in (ours, theirs))
    assert found.any() and found.dtype == oracle.dtype and torch.equal(found, oracle)
    for few in ([], [[]], [[], [polygon(4)]]):
        few = PolygonMasks(few)
        found = FastPolygonMasks(few.polygons).crop_and_resize(boxes[: len(few)], 14)
        assert torch.equal(found, few.crop_and_resize(boxes[: len(few)], 14))


def test_a_detector_that_learns_draws_its_targets_so(monkeypatch):
    drawn = []
    draw = FastPolygonMasks.crop_and_resize
    monkeypatch.setattr(
        FastPolygonMasks,
        "crop_and_resize",
        lambda self, boxes, size: drawn.append(len(boxes)) or draw(self, boxes, size),
    )
    target = Instances((96, 128), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 70.0]])))
    target.gt_classes = torch.tensor([1])
    target.gt_masks = PolygonMasks([[[8.0, 8.0, 60.0, 20.0, 30.0, 70.0]]])
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    with EventStorage():
        _detector()([{"image": image, "instances": target}] * 2)
    assert len(drawn) == 2 and all(drawn)
    assert type(target.gt_masks) is PolygonMasks  # the dataset's own stay


def _boxes(num, clusters, seed=0, side=800.0):
    """Boxes around a few centres, as proposals are, with scores that are all different."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(clusters, 4, generator=generator) * side
    which = torch.randint(clusters, (num,), generator=generator)
    centre = centres[which] + torch.randn(num, 4, generator=generator) * 8
    size = centre[:, 2:].abs() * 0.3 + 4
    boxes = torch.cat((centre[:, :2] - size / 2, centre[:, :2] + size / 2), dim=1)
    return boxes, torch.randperm(num, generator=generator) / num


@pytest.mark.parametrize("clusters", [3, 40, 2000])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_is_torchvisions(monkeypatch, clusters, threshold):
    monkeypatch.setattr(our_heads, "_MAX_PAIRS", 3 * 300**2)  # three groups at a time
    boxes, scores = _boxes(5 * 300, clusters)
    boxes, scores = boxes.view(5, 300, 4), scores.view(5, 300).sort(descending=True)[0]
    valid = torch.rand(5, 300) < 0.9
    kept = suppress(boxes, valid, threshold)
    assert not (kept & ~valid).any()
    groups = torch.arange(5)[:, None].expand(5, 300)[valid]
    oracle = torch.zeros(int(valid.sum()), dtype=torch.bool)
    oracle[batched_nms(boxes[valid].double(), scores[valid].double(), groups, threshold)] = True
    assert torch.equal(kept[valid], oracle)


def test_a_chain_of_boxes_that_each_depend_on_the_last():
    x = torch.arange(100.0)[:, None]
    boxes = torch.cat((x, torch.zeros_like(x), x + 8, torch.full_like(x, 8.0)), dim=1)[None]
    kept = suppress(boxes, torch.ones(1, 100, dtype=torch.bool), 0.7)
    # a box shares 7/9 with the next, and 6/10 with the one after that
    assert kept[0].tolist() == [True, False] * 50


def _rpn(kind, **settings):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(DEMO_CONFIG))
    for key, value in settings.items():
        section = cfg.MODEL.PROPOSAL_GENERATOR if key == "MIN_SIZE" else cfg.MODEL.RPN
        section[key] = value
    torch.manual_seed(0)
    shapes = _detector().backbone.output_shape()
    return kind(cfg, shapes)


def _features(side, num):
    generator = torch.Generator().manual_seed(5)
    return {
        f"p{level}": torch.randn(num, 64, side // 2**level, side // 2**level, generator=generator)
        for level in range(3, 7)
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ([(200, 256)], {}),
        ([(200, 256), (64, 90), (256, 120)], {"MIN_SIZE": 6}),
        ([(200, 256), (5, 7), (256, 256)], {"MIN_SIZE": 20}),  # nothing of the second is left
    ],
)
def test_proposals_are_detectron2s(training, sizes, settings):
    ours, theirs = (_rpn(kind, **settings) for kind in (FastRPN, RPN))
    ours.load_state_dict(theirs.state_dict())
    for rpn in (ours, theirs):
        rpn.train(training)
        torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.03)
        torch.nn.init.normal_(rpn.rpn_head.objectness_logits.weight, std=0.3)
        rpn.predict_proposals = getattr(rpn, "find_proposals", rpn.predict_proposals)
    ours.load_state_dict(theirs.state_dict())
    images = ImageList(torch.zeros(len(sizes), 3, 256, 256), sizes)
    targets = [
        Instances(size, gt_boxes=Boxes(torch.tensor([[0.0, 0.0, 40.0, 30.0]] * (i % 2))))
        for i, size in enumerate(sizes)
    ]
    features = _features(256, len(sizes))
    outputs, gradients, logged = [], [], []
    for rpn in (ours, theirs):
        torch.manual_seed(1)
        with EventStorage() as storage:
            proposals, losses = rpn(images, features, targets)
            logged.append({name: value for name, (value, _) in storage.latest().items()})
        outputs.append((proposals, losses))
        if training:
            sum(losses.values()).backward()
            gradients.append(next(rpn.rpn_head.parameters()).grad)
    (ours, our_losses), (theirs, their_losses) = outputs
    assert len(ours) == len(sizes)
    for a, b in zip(ours, theirs, strict=True):
        assert a.image_size == b.image_size and len(a) == len(b)
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
    assert logged[0] == logged[1]
    assert our_losses.keys() == their_losses.keys()
    for name in our_losses:
        assert our_losses[name].item() == pytest.approx(their_losses[name].item(), rel=1e-6)
    assert not training or relative_difference(*gradients) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_a_box_that_is_not_finite(training):
    rpn = _rpn(FastRPN).train(training)
    features = _features(64, 1)
    features["p3"][0, 0, 2, 2] = torch.nan
    anchors = rpn.anchor_generator([features[name] for name in rpn.in_features])
    logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
    arguments = (
        anchors,
        [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
        [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas],
        [(64, 64)],
    )
    if training:
        with pytest.raises(FloatingPointError, match="Training has diverged"):
            rpn.find_proposals(*arguments)
        return
    with torch.no_grad():
        (found,), (oracle,) = rpn.find_proposals(*arguments), RPN.predict_proposals(rpn, *arguments)
    assert len(found) and torch.equal(found.proposal_boxes.tensor, oracle.proposal_boxes.tensor)

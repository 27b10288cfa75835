"""Our parts of Detectron2's detectors against Detectron2's own."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from helpers import DEMO_CONFIG, relative_difference
from torchvision.ops import batched_nms

from rope_vit_det import add_rope_vit_config
from rope_vit_det import heads as our_heads
from rope_vit_det.heads import FastLayerNorm, FastPolygonMasks, FastRPN, match, sample, suppress


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
        ROI_HEADS__NAME="StandardROIHeads",
        ROI_BOX_HEAD__NAME="FastRCNNConvFCHead",
        ROI_BOX_HEAD__NORM="LN",
        ROI_MASK_HEAD__NAME="MaskRCNNConvUpsampleHead",
        ROI_MASK_HEAD__NORM="LN",
    )
    ours = _detector()
    assert not any(type(module).__module__ == our_heads.__name__ for module in theirs.modules())
    used = {type(m).__name__ for m in ours.modules() if type(m).__module__ == our_heads.__name__}
    names = ("FastRPN", "FastROIHeads", "FastBoxHead", "FastMaskHead", "FastLayerNorm")
    assert used == set(names)
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


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("counts", [(3, 0, 8), (0, 0), (1,)])
def test_matches_are_detectron2s(monkeypatch, counts, low_quality):
    monkeypatch.setattr(our_heads, "_MAX_PAIRS", 2 * 8 * 400)  # two images at a time
    matcher = Matcher([0.3, 0.5], [0, -1, 1], allow_low_quality_matches=low_quality)
    boxes = torch.stack([_boxes(400, 12, seed=i)[0] for i in range(len(counts))])
    targets = [boxes[i, :count] + 3 for i, count in enumerate(counts)]
    if counts[0] == 3:
        targets[0][2] = torch.tensor([-90.0, -90.0, -80.0, -80.0])  # far from every box
    padded, there = our_heads._padded(targets)
    matches, labels = match(matcher, padded, there, boxes)
    for i, target in enumerate(targets):
        overlaps = pairwise_iou(Boxes(target), Boxes(boxes[i]))
        found, expected = matcher(overlaps)
        assert labels.dtype == expected.dtype and torch.equal(labels[i], expected)
        near = overlaps.max(dim=0)[0] > 0 if len(target) else torch.zeros(400, dtype=torch.bool)
        assert torch.equal(matches[i][near], found[near])


@pytest.mark.parametrize(("number", "fraction"), [(16, 0.25), (16, 1.0), (64, 0.5), (3, 0.1)])
def test_samples_are_as_many_as_detectron2s(number, fraction):
    labels = torch.full((4, 40), -1)
    labels[0, :10], labels[0, 20:35] = 1, 0
    labels[1, 5:8] = 1
    labels[2, 30:] = 0
    sampled = sample(labels == 1, labels == 0, number, fraction)
    for row, expected in enumerate(labels):
        oracle = subsample_labels(expected, number, fraction, 0)
        for (places, count), label, of in zip(sampled, (1, 0), oracle, strict=True):
            chosen = places[row, : int(count[row])]
            assert len(chosen) == len(of) == len(chosen.unique())
            assert (expected[chosen] == label).all()


def test_every_box_is_sampled_as_often_and_in_any_order():
    draws = 4000
    positive = torch.zeros(draws, 30, dtype=torch.bool)
    positive[:, ::3] = True  # 10 of 30
    sampled = sample(positive, ~positive, 16, 0.25)
    for (places, count), among, most in zip(sampled, (10, 20), (4, 12), strict=True):
        assert (count == most).all()
        # All that are chosen, and the first of them: binomial, within five deviations.
        for chosen, share in ((places[:, :most], most / among), (places[:, :1], 1 / among)):
            often = chosen.flatten().bincount(minlength=30)
            often = often[often > 0]
            assert len(often) == among
            bound = 5 * (draws * share * (1 - share)) ** 0.5
            assert (often - draws * share).abs().max() < bound


def _objects(size, count, classes=3):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 120
    boxes = torch.cat((corner, corner + 12 + torch.rand(count, 2, generator=generator) * 60), 1)
    outlines = [[box[[0, 1, 2, 1, 2, 3]].tolist()] for box in boxes]
    found = Instances(size, gt_boxes=Boxes(boxes), gt_masks=PolygonMasks(outlines))
    found.gt_classes = torch.randint(classes, (count,), generator=generator)
    return found


@pytest.mark.parametrize("boundary", [-1, 0])
def test_anchors_are_labelled_as_by_detectron2(boundary):
    """All of them, so that nothing is drawn at random."""
    rpn = _rpn(FastRPN, BATCH_SIZE_PER_IMAGE=10**6, POSITIVE_FRACTION=1.0, BOUNDARY_THRESH=boundary)
    features = _features(256, 3)
    anchors = rpn.anchor_generator([features[name] for name in rpn.in_features])
    targets = [_objects((200, 256), 5), _objects((256, 120), 0), _objects((256, 256), 2)]
    labels, boxes = rpn.label_together(anchors, targets)
    expected_labels, expected_boxes = RPN.label_and_sample_anchors(rpn, anchors, targets)
    assert len(labels) == len(boxes) == 3
    for found, expected in zip(labels, expected_labels, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert (labels[0] == 1).any() and (labels[0] == 0).any()
    for found, expected, label in zip(boxes, expected_boxes, labels, strict=True):
        assert found.shape == expected.shape
        assert torch.equal(found[label == 1], expected[label == 1])


def _in_order(instances):
    order = sorted(range(len(instances)), key=lambda i: instances.proposal_boxes.tensor[i].tolist())
    return instances[torch.tensor(order, dtype=torch.int64)]


@pytest.mark.parametrize("kind", ["ROIHeads", "CascadeROIHeads"])
@pytest.mark.parametrize(("append", "labels"), [(True, [0, 1]), (False, [0, 1]), (True, [-1, 1])])
def test_proposals_are_labelled_as_by_detectron2(kind, append, labels):
    """All of them, so that nothing is drawn at random."""
    heads = _detector(
        ROI_HEADS__NAME=f"Fast{kind}",
        ROI_HEADS__BATCH_SIZE_PER_IMAGE=1000,
        ROI_HEADS__POSITIVE_FRACTION=1.0,
        ROI_HEADS__PROPOSAL_APPEND_GT=append,
        ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True,
    ).roi_heads
    oracle = CascadeROIHeads if kind == "CascadeROIHeads" else StandardROIHeads
    assert isinstance(heads, oracle)
    heads.proposal_matcher = Matcher([0.5], labels)
    size, proposals, targets = (256, 256), [], []
    for count in (4, 0, 7):
        targets.append(_objects(size, count))
        drawn = _boxes(50 + count, 9, seed=count, side=150.0)[0]
        boxes = torch.cat((drawn, targets[-1].gt_boxes.tensor + 4))
        logits = torch.randn(len(boxes))
        proposals.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
    results, logged = [], []
    for label in (heads.label_together, lambda *x: oracle.label_and_sample_proposals(heads, *x)):
        with EventStorage() as storage:
            results.append(label(copy.deepcopy(proposals), targets))
            logged.append({name: value for name, (value, _) in storage.latest().items()})
    assert logged[0] == logged[1] and logged[0]["roi_head/num_fg_samples"] > 3
    for found, expected in zip(*results, strict=True):
        assert found.get_fields().keys() == expected.get_fields().keys()
        is_object = found.gt_classes < heads.num_classes
        assert (is_object.long().diff() <= 0).all()  # the positive ones first
        if found.has("gt_masks"):  # of which each begins in a corner of its box
            corners = [outlines[0][:2].tolist() for outlines in found.gt_masks.polygons]
            assert corners == found.gt_boxes.tensor[:, :2].tolist()
        found, expected = _in_order(found), _in_order(expected)
        for name in ("proposal_boxes", "objectness_logits", "gt_classes"):
            pair = (getattr(each.get(name), "tensor", each.get(name)) for each in (found, expected))
            assert torch.equal(*pair), name
        found, expected = (each[each.gt_classes < heads.num_classes] for each in (found, expected))
        if len(found):
            assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
            masks = zip(found.gt_masks.polygons, expected.gt_masks.polygons, strict=True)
            assert all((a[0] == b[0]).all() for a, b in masks)


def test_losses_of_labels_that_were_found_together_are_detectron2s():
    settings = dict(RPN__BATCH_SIZE_PER_IMAGE=10**5, ROI_HEADS__BATCH_SIZE_PER_IMAGE=10**4)
    ours = _detector(RPN__POSITIVE_FRACTION=1.0, ROI_HEADS__POSITIVE_FRACTION=1.0, **settings)
    theirs = copy.deepcopy(ours)
    for part, name in (
        (ours.proposal_generator, "label_and_sample_anchors"),
        (ours.roi_heads, "label_and_sample_proposals"),
    ):
        setattr(part, name, part.label_together)
    pixels = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    images = [{"image": pixels, "instances": _objects((256, 256), n)} for n in (4, 0)]
    with EventStorage():
        found, expected = (detector(images) for detector in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4), name

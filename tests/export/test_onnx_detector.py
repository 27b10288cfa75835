"""Inference written for exporters beside Detectron2's own, and its graph beside both."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import FCOS, ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from helpers import DEMO_CONFIG, move_off_initial_values

from rope_vit_det import add_rope_vit_config
from rope_vit_det.errors import InputError
from rope_vit_det.export.checks import ONNX_LIMITS, compare_detections
from rope_vit_det.export.onnx_detector import OnnxDetector
from rope_vit_det.export.onnx_file import export_onnx, load_onnx
from rope_vit_det.export.pyramid import dynamic_sides, with_padding
from rope_vit_det.export.traced_detector import find_instances, pad

AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
KEYPOINTS = (
    *("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "TEST.DETECTIONS_PER_IMAGE", "5"),
)
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "4"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.01"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [128], [256], [512]]"),
)
KINDS = {
    "mask": (),
    "faster": ("MODEL.MASK_ON", "False", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"),
    "agnostic": (*AGNOSTIC, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
    "cascade": ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", *AGNOSTIC),
    "keypoint": KEYPOINTS,
    "retinanet": RETINANET,
    "fcos": RETINANET,
}


def build(kind, *opts):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(DEMO_CONFIG)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *KINDS.get(kind, ()), *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    if kind == "fcos":
        shapes = model.head_in_features, model.backbone.output_shape()
        shapes = [shapes[1][name] for name in shapes[0]]
        head = FCOSHead(input_shape=shapes, num_classes=4, conv_dims=[16])
        mean, std = (each.flatten().tolist() for each in (model.pixel_mean, model.pixel_std))
        model = FCOS(
            backbone=model.backbone,
            head=head,
            head_in_features=model.head_in_features,
            num_classes=4,
            test_score_thresh=0.05,
            pixel_mean=mean,
            pixel_std=std,
        )
    return move_off_initial_values(model)


def images():
    """With less than a multiple of padding, without, small; with nothing to find."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((155, 181), (192, 128), (60, 70))
    yield from (torch.rand(3, *size, generator=generator) * 255 for size in sizes)


def assert_same(found, detector, image, atol):
    with torch.no_grad():
        expected = find_instances(detector, *pad(image, 32))
    assert set(found) == set(expected.get_fields())
    for name, values in found.items():
        wanted = expected.get(name)
        wanted = wanted.tensor if name == "pred_boxes" else wanted
        torch.testing.assert_close(values, wanted, rtol=atol, atol=atol)
    return len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_detectron2s(kind):
    detector = build(kind)
    model, padded = OnnxDetector(detector), with_padding(detector, 32)
    number = 0
    for image in images():
        with torch.no_grad():
            found = dict(zip(model.names, model(*pad(image, 32)), strict=True))
        number += assert_same(found, padded, image, atol=0)
    assert number


@ROI_HEADS_REGISTRY.register()
class HeadsOfAUser(StandardROIHeads):
    """May do anything."""


@pytest.mark.parametrize(
    ("opts", "part"),
    [
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "MODEL.META_ARCHITECTURE is a PanopticFPN"),
        (("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), "a SemanticSegmentor"),
        (("MODEL.ROI_HEADS.NAME", "HeadsOfAUser"), "roi_heads is a HeadsOfAUser"),
        (("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"), "level_poolers.0 is a RoIPool"),
        (("MODEL.LOAD_PROPOSALS", "True", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
         "proposal_generator"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_exported_is_named(opts, part):
    with pytest.raises(InputError, match=part) as refused:
        OnnxDetector(build("", *opts))
    assert "--part backbone" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_finds_the_same(kind, tmp_path):
    detector = build(kind)
    model, padded = OnnxDetector(detector).eval(), with_padding(detector, 32)
    image, *others = images()
    others += [torch.rand(3, 352, 416) * 255, torch.full((3, 64, 96), 128.0)]
    inputs = dict(zip(("image", "size"), pad(image, 32), strict=True))
    rows, columns = dynamic_sides(detector.backbone, 32)
    graph = export_onnx(model, inputs, ({1: rows, 2: columns}, None), model.names, 32, "{}")
    (tmp_path / "d.onnx").write_bytes(graph)
    run = load_onnx(tmp_path / "d.onnx")
    least = 0.01 if kind == "retinanet" else 0.05
    compare_detections(padded, run, others, least, 32, ONNX_LIMITS)

    def with_more_padding(image, size):
        return run(F.pad(image, (0, 96, 0, 64), value=200.0), size)

    compare_detections(padded, with_more_padding, others, least, 32, ONNX_LIMITS)
    for size in ((0, 32), (32, -1), (33, 32), (32, 65)):
        with pytest.raises(Exception, match="size_must_be_that_of_a_part_of_the_image"):
            run(torch.zeros(3, 32, 64), torch.tensor(size))
    with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_32"):
        run(torch.zeros(3, 32, 65), torch.tensor([32, 64]))

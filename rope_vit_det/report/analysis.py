"""What a detector costs, part by part."""

import argparse
from functools import partial

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor, nn

from ..config.keys import with_settings
from ..engine.lazy import load_lazy_config
from ..engine.setup import load_config
from ..models import RoPEViT
from ..models.complexity import (
    Complexity,
    complexity_table,
    count_complexity,
    describe_size,
    network_part,
    padded_size,
)


def analyze(args: argparse.Namespace) -> str:
    """The table of a config's detector.

    Args:
        args: with `size` (h, w), `config_file` and `opts`, as of
            :func:`~rope_vit_det.engine.command_line.argument_parser`.

    Raises:
        InputError: for a wrong config.
    """
    parts, size = detector_complexity(build_detector(args), *args.size)
    return f"{', '.join(args.config_file)}, {describe_size(size)}\n\n{complexity_table(parts)}"


def build_detector(args: argparse.Namespace) -> nn.Module:
    """The detector of a yaml config or a LazyConfig, with random weights, for inference on the CPU.

    Args:
        args: with `config_file` and `opts`, of
            :func:`~rope_vit_det.engine.command_line.argument_parser`.

    Raises:
        InputError: for a wrong config.
    """
    if args.config_file[-1].endswith(".py"):
        return instantiate(load_lazy_config(args).model).eval()
    return build_model(with_settings(load_config(args), {"MODEL.DEVICE": "cpu"})).eval()


def detector_complexity(
    detector: nn.Module, height: int, width: int
) -> tuple[dict[str, Complexity], tuple[int, int]]:
    """What the parts of a detector cost for one image.

    Heads that take proposals get as many as they can at most, so that the counts depend on no
    weights and no image: POST_NMS_TOPK_TEST boxes, and DETECTIONS_PER_IMAGE masks or keypoints.

    Args:
        detector: on the CPU, in evaluation mode; spent afterwards.
        height, width: of the image in pixels.

    Returns:
        The parts, and the (height, width) that the image is padded to.
    """
    backbone: Backbone = detector.backbone
    padded = padded_size((height, width), max(backbone.size_divisibility, 1))
    backbone.to("meta")
    parts = count_complexity(
        backbone, torch.empty(1, 3, *padded, device="meta"), partial(_backbone_part, backbone)
    )
    # After the network, which lies in it.
    pyramid = {name: parts.pop(name) for name in ("pyramid",) if name in parts}
    backbone.forward = partial(_random_features, backbone.output_shape())
    _keep_everything(detector)
    image = {"image": torch.zeros(3, height, width), "height": height, "width": width}
    heads = count_complexity(detector, [image], _head)
    del heads["backbone"]  # counted already
    return parts | pyramid | heads, padded


def _random_features(shapes: dict[str, ShapeSpec], images: Tensor) -> dict[str, Tensor]:
    """In place of a backbone's: feature maps of its shapes, at no cost."""

    def grid(stride: int) -> list[int]:
        return [-(-side // stride) for side in images.shape[-2:]]

    return {
        name: torch.randn(len(images), shape.channels, *grid(shape.stride))
        for name, shape in shapes.items()
    }


def _keep_everything(detector: nn.Module) -> None:
    for module in detector.modules():
        if isinstance(module, RPN):
            module.nms_thresh = 1.0
        elif isinstance(module, FastRCNNOutputLayers):
            module.test_score_thresh, module.test_nms_thresh = -1.0, 1.0


def _head(path: str) -> str:
    first, _, rest = path.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "roi_heads" else first or "other"


def _backbone_part(backbone: Backbone, path: str) -> str:
    if isinstance(backbone, RoPEViT):
        return network_part(path)
    if isinstance(getattr(backbone, "net", None), RoPEViT) and path.startswith("net."):
        return network_part(path.removeprefix("net."))
    return "pyramid"

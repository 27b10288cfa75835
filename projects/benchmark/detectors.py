"""Whole detectors: a training step and the inference of ours and of its peers.

Ours is what a yaml recipe gives, as it is. The peers, Detectron2's ViTDet and birder's network at
stride 16, both of our width and depth, stand once under Detectron2's own parts (pyramid, heads,
LayerNorm, labelling, NMS) and its own step with plain AdamW, eager; and once under the recipe's.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from projects.benchmark.bars import check_bars
from projects.benchmark.measure import InMode, interleaved, machine, peak_mib, today
from projects.benchmark.networks import CONTESTANTS, birder_net, is_installed, vitdet_net
from rope_vit_det import add_rope_vit_config, create_model
from rope_vit_det.engine.setup import load_config
from rope_vit_det.engine.train_step import build_train_step
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError

RECIPE = "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_1x.yaml"
MODES = ("step", "predict")
OBJECTS = 7  # of a COCO image, on average
# Network, under whose heads and step.
DETECTORS = (
    ("windowed", "recipe"),
    ("global", "recipe"),
    ("vitdet", "Detectron2"),
    ("birder", "Detectron2"),
    ("vitdet", "recipe"),
    ("birder", "recipe"),
)
# ViTDet's heads (arXiv 2203.16527, section 3) of Detectron2's own parts, over the zoo's config.
_DETECTRON2 = [
    *("MODEL.FPN.NORM", "LN", "MODEL.RPN.CONV_DIMS", [-1, -1]),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
    *("MODEL.ROI_BOX_HEAD.NORM", "LN", "MODEL.ROI_MASK_HEAD.NORM", "LN"),
]


@dataclass
class Detector:
    """One that is measured."""

    network: str
    heads: str
    cfg: CfgNode
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class DetectorOptions:
    """What to measure.

    Attributes:
        detectors: of `DETECTORS`, network and heads.
        modes: "step", a training step of a batch; "predict", `model.inference` of one image on the
            device, with 100 detections and masks pasted. Both in bf16 under autocast.
        sizes: (h, w) of the images, in pixels.
        batch_sizes: images of a step.
        repeats: rounds, after two that only warm up.
        recipe: a yaml config of a Mask R-CNN.
        opts: KEY VALUE pairs over it and over Detectron2's.
    """

    detectors: Sequence[tuple[str, str]] = DETECTORS
    modes: Sequence[str] = MODES
    sizes: Sequence[tuple[int, int]] = ((1024, 1024),)
    batch_sizes: Sequence[int] = (8,)
    repeats: int = 5
    device: str = "cpu"
    recipe: str = RECIPE
    opts: Sequence[str] = ()


def run_detectors(options: DetectorOptions) -> dict[str, Any]:
    """Measures, interleaved: each round times every case once, so that drift meets all of them.

    Returns:
        A JSON-like dict: "date", "machine", "options", "absent" (peers that are not installed),
        "failed" (what, and why), "measurements", "bars".

    Raises:
        InputError: an unknown name or mode, or a wrong config.
    """
    if unknown := [each for each in options.detectors if tuple(each) not in DETECTORS]:
        known = ", ".join(dict.fromkeys(network for network, _ in DETECTORS))
        raise InputError(f"networks: unknown {unknown[0][0]!r}; known are {known}")
    if unknown := [each for each in options.modes if each not in MODES]:
        raise InputError(f"modes: unknown {unknown[0]!r}; known are {', '.join(MODES)}")
    device = torch.device(options.device)
    torch.manual_seed(0)
    wanted = [(network, heads) for network, heads in options.detectors]
    present = [each for each in wanted if is_installed(CONTESTANTS[each[0]].needs)]
    detectors = [build_detector(*each, options) for each in present]
    failed: list[dict[str, Any]] = []
    measurements: list[dict[str, Any]] = []
    with EventStorage():
        for mode in options.modes:
            make = _step if mode == "step" else _predict
            cases = [
                (_label(mode, each, size, batch_size), each.model, make(each, size, batch_size))
                for size in options.sizes
                for batch_size in (options.batch_sizes if mode == "step" else (1,))
                for each in detectors
            ]
            measurements += _measure(cases, options.repeats, device, failed)
            for each in detectors:  # what only training needs
                each.optimizer = None
                _drop_gradients(each.model)
    where = machine(device)
    return {
        "date": today(),
        "machine": where,
        "options": {**vars(options), "detectors": wanted},
        "absent": sorted({each[0] for each in wanted if each not in present}),
        "failed": failed,
        "measurements": measurements,
        "bars": check_bars(measurements, where["kind"]),
    }


def format_detectors(results: dict[str, Any]) -> str:
    """The measurements as a table in Markdown."""
    times = {_key(each): each["median_s"] for each in results["measurements"]}
    rows = []
    for each in results["measurements"]:
        images = each["batch_size"] / each["median_s"]
        ratios = [
            times.get(_key({**each, "network": peer, "heads": "Detectron2"}))
            for peer in ("vitdet", "birder")
        ]
        rows.append(
            [
                each["mode"],
                each["network"],
                each["heads"],
                "×".join(map(str, each["size"])),
                each["batch_size"],
                f"{1000 * each['median_s']:.1f}",
                f"{images:.2f}",
                *("" if time is None else f"{time / each['median_s']:.2f}" for time in ratios),
                f"{each['held_mib'] / 1024:.1f}",
                "" if each["peak_mib"] is None else f"{each['peak_mib'] / 1024:.1f}",
            ]
        )
    headers = ["mode", "network", "heads and step", "pixels", "batch", "ms", "images/s"]
    headers += ["× ViTDet", "× birder", "held GiB", "peak beyond GiB"]
    lines = [f"{name}: not installed, not measured" for name in results["absent"]]
    lines += [f"{each['network']}, {each['heads']}: {each['why']}" for each in results["failed"]]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n".join([*lines, "", table])


def _key(each: dict[str, Any]) -> tuple:
    return tuple(str(each[key]) for key in ("mode", "network", "heads", "size", "batch_size"))


def _label(mode: str, each: Detector, size: tuple[int, int], batch_size: int) -> dict[str, Any]:
    return {
        "mode": mode,
        "network": each.network,
        "heads": each.heads,
        "size": list(size),
        "batch_size": batch_size,
    }


def _measure(
    cases: list[tuple[dict[str, Any], nn.Module, Callable[[], object]]],
    repeats: int,
    device: torch.device,
    failed: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    calls = [InMode(model, label["mode"] == "step", call) for label, model, call in cases]
    times = interleaved(calls, device, repeats=repeats, warm_up=2)
    measured = []
    for (label, model, _), call, taken in zip(cases, calls, times, strict=True):
        if isinstance(taken, str):
            failed.append({**label, "why": taken})
            continue
        measured.append(
            {
                **label,
                "median_s": median(taken),
                "seconds": taken,
                "images_per_s": label["batch_size"] / median(taken),
                # weights, and in training gradients and two averages
                "held_mib": _mib(model) * (4 if label["mode"] == "step" else 1),
                "peak_mib": peak_mib(call, device),
            }
        )
    return measured


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _mib(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def build_detector(network: str, heads: str, options: DetectorOptions) -> Detector:
    """One of `DETECTORS`, with random weights."""
    fixed = ["MODEL.DEVICE", options.device, "MODEL.WEIGHTS", "", "SEED", "1"]
    given = Namespace(config_file=[options.recipe], opts=[*fixed, *options.opts], num_gpus=1)
    recipe = load_config(given)
    recipe.defrost()
    if network == "global":
        recipe.MODEL.ROPE_VIT.WINDOW_SIZE = 0
    if network in ("windowed", "global"):
        return Detector(network, heads, recipe, _find_one_class(Trainer.build_model(recipe)))
    cfg = recipe if heads == "recipe" else _detectron2_config(recipe, options.opts)
    # To build the network for, and in whose pyramid to put it.
    cfg.MODEL.BACKBONE.NAME, own = f"benchmark_{network}", cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.BACKBONE.OWN = own if heads == "recipe" else ""
    return Detector(network, heads, cfg, _find_one_class(build_model(cfg)))


def _detectron2_config(recipe: CfgNode, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_rope_vit_config(cfg)  # for the network's name
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    cfg.merge_from_file(model_zoo.get_config_file(zoo))
    cfg.merge_from_list([*_DETECTRON2, "MODEL.DEVICE", recipe.MODEL.DEVICE, *opts])
    return cfg


def _find_one_class(model: nn.Module) -> nn.Module:
    """With random weights no score would pass the threshold: to this one all boxes are a person."""
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] += 6
    return model


class _Birder(Backbone):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._out_features = ["neck"]
        self._out_feature_channels = {"neck": net.return_channels[-1]}
        self._out_feature_strides = {"neck": net.patch_size}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"neck": self.net.detection_features(x)["stage1"]}


@BACKBONE_REGISTRY.register()
def benchmark_birder(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """birder's variant of our network whose kernel has the stride that heads want, 16 px."""
    name = cfg.MODEL.ROPE_VIT.NAME
    return _in_pyramid(cfg, input_shape, _Birder(birder_net(name.removesuffix("14") + "16")))


@BACKBONE_REGISTRY.register()
def benchmark_vitdet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ViT, as wide and deep as ours."""
    with torch.device("meta"):
        ours = create_model(cfg.MODEL.ROPE_VIT.NAME, features_only=True)
    net = vitdet_net(ours.hidden_dim, len(ours.encoder.block))
    return _in_pyramid(cfg, input_shape, net)


def _in_pyramid(cfg: CfgNode, input_shape: ShapeSpec, net: Backbone) -> Backbone:
    (feature,) = net.output_shape()
    if not cfg.MODEL.BACKBONE.OWN:
        return SimpleFeaturePyramid(
            net=net,
            in_feature=feature,
            out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
            scale_factors=(4.0, 2.0, 1.0, 0.5),
            top_block=LastLevelMaxPool(),
            norm="LN",
            square_pad=0,
        )
    pyramid = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.OWN)(cfg, input_shape)
    pyramid.net, pyramid.in_feature = net, feature
    return pyramid


def _step(each: Detector, size: tuple[int, int], batch_size: int) -> Callable[[], None]:
    batches = _batches(each.cfg, size, batch_size)
    trainer: SimpleTrainer
    each.model.train()
    if each.heads == "recipe":
        each.optimizer = each.optimizer or Trainer.build_optimizer(each.cfg, each.model)
        trainer = build_train_step(each.cfg, each.model, batches, each.optimizer)
    else:
        each.optimizer = each.optimizer or torch.optim.AdamW(each.model.parameters(), lr=1e-5)
        trainer = SimpleTrainer(_Autocast(each.model), batches, each.optimizer)
    trainer.iter = 0
    return trainer.run_step


class _Autocast(nn.Module):
    """A detector in bf16, as Detectron2's own trainer in mixed precision runs it on GPUs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            return self.model(data)


def _predict(each: Detector, size: tuple[int, int], batch_size: int) -> Callable[[], object]:
    sample = next(_batches(each.cfg, size, batch_size))
    model = each.model
    device = next(model.parameters()).device
    inputs = [{**image, "image": image["image"].to(device)} for image in sample]

    @torch.inference_mode()
    def call() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return model.inference(inputs)

    return call


def _batches(
    cfg: CfgNode, size: tuple[int, int], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, *size, cfg.MODEL.ROI_HEADS.NUM_CLASSES) for _ in range(batch_size)
    ]
    if cfg.INPUT.MASK_FORMAT == "bitmask":
        for each in samples:
            polygons = [list(mask) for mask in each["instances"].gt_masks.polygons]
            each["instances"].gt_masks = BitMasks.from_polygon_masks(polygons, *size)
    while True:
        yield copy.copy(samples)


def random_sample(
    rng: np.random.Generator, height: int, width: int, classes: int = 1
) -> dict[str, Any]:
    """Noise with as many objects as a COCO image has, as Detectron2's mapper would give it."""
    corner = rng.uniform(0, (0.6 * width, 0.6 * height), (OBJECTS, 2))
    size = rng.uniform((0.1 * width, 0.1 * height), (0.4 * width, 0.4 * height), (OBJECTS, 2))
    boxes = np.concatenate((corner, corner + size), axis=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
    instances.gt_classes = torch.from_numpy(rng.integers(0, classes, OBJECTS))
    instances.gt_masks = PolygonMasks([[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes])
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return {"image": image, "height": height, "width": width, "instances": instances}

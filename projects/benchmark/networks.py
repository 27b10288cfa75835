"""The networks that are measured: ours, and the peers as far as they are installed."""

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rope_vit_det.errors import InputError
from rope_vit_det.models import create_model

OUR_NETWORK = "rope_vit_reg4_b14"


@dataclass(frozen=True)
class Contestant:
    """A backbone of ViT-B's size that takes images of any size to one feature map."""

    name: str
    what: str
    build: Callable[["NetworkOptions"], nn.Module]
    ours: bool = False
    needs: str | None = None  # the package it comes from


@dataclass(frozen=True)
class NetworkOptions:
    """What there is to choose about our network."""

    name: str = OUR_NETWORK
    patch_stride: int | None = None  # None: its own patch size, at which it equals birder's
    window_size: int = 16
    compile: bool = False  # as MODEL.ROPE_VIT.COMPILE


class FeatureMap(nn.Module):
    """A network with its call to one feature map, (N, 3, H, W) to (N, C, H / patch, W / patch)."""

    def __init__(
        self, net: nn.Module, patch: int, call: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.net = net
        self.patch = patch
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


def _neck(net: nn.Module, x: Tensor) -> Tensor:
    return net.detection_features(x)["neck"]


def _ours(options: NetworkOptions, **kwargs: object) -> FeatureMap:
    net = create_model(
        options.name,
        patch_stride=options.patch_stride,
        compile=options.compile,
        features_only=True,
        **kwargs,
    )
    return FeatureMap(net, net.patch_stride, _neck)


def _ours_windowed(options: NetworkOptions, **kwargs: object) -> FeatureMap:
    return _ours(options, window_size=options.window_size, **kwargs)


def spare_birder_polars() -> None:
    """Puts an empty module in the place of polars (54 MB), where it is not installed.

    birder imports it for its tables of results, of which networks know nothing.
    """
    if importlib.util.find_spec("birder") is None or "polars" in sys.modules:
        return
    if importlib.util.find_spec("polars") is None:
        sys.modules["polars"] = _Nothing("polars")


class _Nothing(ModuleType):
    """Has a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def birder_net(name: str) -> nn.Module:
    """birder's network of that name, for images of any size.

    Raises:
        InputError: birder has none.
    """
    spare_birder_polars()
    registry = importlib.import_module("birder.model_registry").registry
    importlib.import_module("birder.net.rope_vit")  # registers its networks
    if not registry.exists(name):
        raise InputError(f"birder has no network {name}")
    net: nn.Module = registry.net_factory(name, 0, size=(224, 224))
    net.set_dynamic_size()
    return net


def vitdet_net(width: int = 768, depth: int = 12) -> nn.Module:
    """Detectron2's, as in its configs/common/models/mask_rcnn_vitdet.py; ViTDet-B by default."""
    windowed = [i for i in range(depth) if (i + 1) % (depth // 4)]
    return importlib.import_module("detectron2.modeling").ViT(
        img_size=1024,
        patch_size=16,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=windowed,
        residual_block_indexes=[],
        use_rel_pos=True,
        out_feature="last_feat",
    )


def _birder(options: NetworkOptions) -> FeatureMap:
    net = birder_net(options.name)
    return FeatureMap(net, net.patch_size, lambda net, x: net.detection_features(x)["stage1"])


def _vitdet(options: NetworkOptions) -> FeatureMap:
    return FeatureMap(vitdet_net(), 16, lambda net, x: net(x)["last_feat"])


def _eva02(options: NetworkOptions) -> FeatureMap:
    net = importlib.import_module("timm").create_model(
        "eva02_base_patch14_448", pretrained=False, num_classes=0, dynamic_img_size=True
    )

    def call(net: nn.Module, x: Tensor) -> Tensor:
        return net.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]

    return FeatureMap(net, 14, call)


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("global", "ours, attention over the whole grid", _ours, ours=True),
        Contestant(
            "windowed",
            "ours, windows, the last block of each quarter global",
            _ours_windowed,
            ours=True,
        ),
        Contestant(
            "windows-only",
            "ours, windows in every block",
            partial(_ours_windowed, global_blocks=()),
            ours=True,
        ),
        Contestant("birder", "birder's network, detection_features", _birder, needs="birder"),
        Contestant(
            "vitdet", "Detectron2's ViTDet-B, window 14, relative positions", _vitdet, needs="timm"
        ),
        Contestant("eva02", "timm's eva02_base_patch14, last features", _eva02, needs="timm"),
    )
}


def is_installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def share_parameters(ours: Sequence[FeatureMap], birder: FeatureMap | None) -> None:
    """Lets our networks, and birder's where it is among them, hold the same weights.

    Equal weights make equal outputs, and one copy of them leaves memory for the measurements.
    """
    if ours:
        source = (birder or ours[0]).net.state_dict(keep_vars=True)
        weights = {key: source[key] for key in ours[0].net.state_dict()}
        for model in ours:
            model.net.load_state_dict(weights, assign=True)


def forward_flops(model: FeatureMap, image: tuple[int, int]) -> int:
    """Floating-point operations in the matrix products of one image (H, W) in pixels.

    A multiplication and its addition count as 2, as everywhere.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(torch.zeros(1, 3, *image, device="meta"))
    return counter.get_total_flops()

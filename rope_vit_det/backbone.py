"""The RoPE ViT as a Detectron2 backbone: its neck alone, or under a simple feature pyramid."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from . import heads  # not what is in it: that may be what is being imported
from .config.keys import (
    PYRAMID_STRIDE,
    check_pyramid_config,
    check_rope_vit_config,
    get_key,
    warn_of_high_rate,
)
from .config.use import as_arguments, compared_settings, disagreement, settings_for
from .errors import InputError
from .layers.graphs import ReplayedInference
from .models import RoPEViT, create_model
from .pyramids import FeatureShapes, levels_read, pyramid_for_heads
from .utils.arguments import ArgumentError, check_argument
from .weights.adapters import restore_base
from .weights.detectron2_format import info_from_metadata
from .weights.info import WeightsInfo

logger = logging.getLogger(__name__)
# A child of Detectron2's, so that what was loaded is told in scripts that know nothing of us.
load_logger = logging.getLogger("detectron2.checkpoint.rope_vit_det")


class RoPEViTBackbone(RoPEViT, Backbone):
    """A :class:`RoPEViT` whose output is the feature map "neck", without anything behind it.

    Loading a state dict that has some of its tensors but not all, or none, is an error: a detector
    over a half-loaded backbone trains, and is bad without a word.
    """

    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: of :class:`RoPEViT`.
        """
        super().__init__(**kwargs, features_only=True)
        self._out_features = ["neck"]
        self._out_feature_channels = {"neck": self.hidden_dim}
        self._out_feature_strides = {"neck": self.patch_stride}
        # What the config says that weights should agree with; None: there is none, or no wish to.
        self.settings: dict[str, Any] | None = None

    # A backbone's output in place of the logits.
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`RoPEViT.detection_features`.

        A network in bf16 takes float32 images, and gives a neck in float32.
        """
        dtype = self.conv_proj.weight.dtype
        if dtype == x.dtype or dtype == torch.float32:
            return self.detection_features(x)
        return {k: y.to(x.dtype) for k, y in self.detection_features(x.to(dtype)).items()}

    @property
    def size_divisibility(self) -> int:
        return self.patch_stride

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        # Detectron2's checkpointer drops tensors of another shape before they come here, and takes
        # what is missing with a log line; this is the one place that every load passes.
        own = [prefix + key for key in self.state_dict()]
        found = [key for key in state_dict if key.startswith(prefix) and ".lora_" in key]
        if not found:  # the weights that adapters are added to
            own = [key for key in own if ".lora_" not in key]
        elif found[0] not in own:
            rank = next(len(state_dict[key]) for key in found if key.endswith("lora_a"))
            raise InputError(
                f"the checkpoint has LoRA's adapters: set MODEL.ROPE_VIT.LORA.RANK {rank}"
            )
        restore_base(state_dict, prefix, local_metadata)
        missing = [key for key in own if key not in state_dict]
        birder = info_from_metadata(local_metadata)
        if birder and not birder[0].network:  # it fits networks that differ in biases of zero
            for key in [key for key in missing if key.endswith(".attn.qkv.bias")]:
                state_dict[key] = torch.zeros_like(self.get_parameter(key.removeprefix(prefix)))
                missing.remove(key)
        if missing:
            some = f"{len(own) - len(missing)} of" if len(missing) < len(own) else "none of"
            raise InputError(
                f"the checkpoint has {some} the {len(own)} backbone tensors in the shapes that "
                f"MODEL.ROPE_VIT asks for (missing: {_shorten(missing)}); "
                + _remedy(birder[0] if birder else None)
            )
        for key, own_scale in self.named_buffers(prefix.removesuffix(".")):
            if found and key.endswith(".lora_scale"):  # a buffer: the checkpoint's would win
                _check_scale(state_dict, key, own_scale)
        for key, parameter in self.named_parameters():
            # A network that may fill the memory takes these tensors, instead of copies of them.
            given = state_dict.get(prefix + key, parameter)
            if parameter.dtype == torch.bfloat16 and given.shape == parameter.shape:
                parameter.data = given.to(parameter)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if birder:
            self._tell(len(own), *birder)

    def _tell(self, loaded: int, info: WeightsInfo, source: str) -> None:
        name = " ".join(filter(None, (info.network, info.tag)))
        load_logger.info(
            "Loaded %d of %d backbone tensors from %s (%s)", loaded, loaded, source, name
        )
        problem = self.settings and disagreement(self.settings, info)
        if problem:
            load_logger.warning(
                "%s does not fit the config, results will be worse: %s "
                "(MODEL.ROPE_VIT.CHECK_WEIGHTS False silences this)",
                source,
                problem,
            )


class RoPEViTNeck(Backbone):
    """The neck alone, for heads that take one feature map. It holds the network as ``net``."""

    def __init__(self, net: RoPEViTBackbone) -> None:
        super().__init__()
        self.net = net
        self._replayed = ReplayedInference()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to {"neck": (N, hidden_dim, H / stride, W / stride)}."""
        if self.net.compiled:
            return self._replayed(self, self.net, x, self.net.pt_grid_size)
        return self.net(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(Backbone.output_shape(self.net))

    @property
    def size_divisibility(self) -> int:
        return self.net.size_divisibility


class RoPEViTPyramid(SimpleFeaturePyramid):
    """Detectron2's :class:`SimpleFeaturePyramid`, with images padded to a multiple of 32.

    Detectron2's own misspells the key that asks for padding, so that images would be cropped to
    the grid. Never padded to a square.
    """

    def __init__(
        self, *args: Any, out_features: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            args, kwargs: of :class:`SimpleFeaturePyramid`.
            out_features: the levels to build, by stride, under names of one's own that end in the
                level's number, such as res2 and res5; without a top block. None: all, p2 and so on.
        """
        super().__init__(*args, **kwargs)
        self._out_features: list[str]
        self.stages: list[nn.Module]
        self._replayed = ReplayedInference()
        if out_features is None:
            return
        wanted = {f"p{name[-1]}": name for name in out_features}
        stages = dict(zip(self._out_features, self.stages, strict=True))
        for level in stages.keys() - wanted:
            delattr(self, f"simfp_{level[1:]}")
        self.stages = [stages[level] for level in wanted]
        for shapes in ("_out_feature_strides", "_out_feature_channels"):
            values = getattr(self, shapes)
            setattr(self, shapes, {name: values[level] for level, name in wanted.items()})
        self._out_features = list(wanted.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W), H and W multiples of 32, to the levels by name."""
        if getattr(self.net, "compiled", False):  # it may be another backbone
            return self._replayed(self, super().forward, x, self.net.pt_grid_size)
        return super().forward(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility}


def create_backbone(
    name: str,
    *,
    patch_stride: int = PYRAMID_STRIDE,
    freeze_blocks: int = 0,
    dtype: str = "float32",
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    **kwargs: Any,
) -> RoPEViTBackbone:
    """A named network as a backbone, from explicit arguments: what MODEL.ROPE_VIT stands for.

    Args:
        name: a key of :data:`~rope_vit_det.models.VARIANTS`.
        patch_stride: pixels between patches; the pyramids take 16.
        freeze_blocks: 0: none; n: stem, special tokens, position table and the first n blocks;
            -1: all.
        dtype: of the weights: "float32", or "bfloat16" for a network all of which is frozen. Those
            are zeros, and take no memory, until weights are loaded.
        lora_rank, lora_alpha, lora_dropout: see :meth:`RoPEViT.adapt`.
        kwargs: of :func:`~rope_vit_det.models.create_model`: image_size, pt_grid_size,
            window_size, global_blocks, drop_path_rate, activation_checkpoint.

    Raises:
        ValueError: for an unknown name or a wrong value.
    """
    allowed = ("float32", "bfloat16") if freeze_blocks == -1 else ("float32",)
    what = '"float32", or "bfloat16" where FREEZE_BLOCKS is -1'
    check_argument("dtype", dtype, dtype in allowed, what)
    lean = dtype == "bfloat16"
    with torch.device("meta") if lean else nullcontext():
        net = create_model(name, patch_stride=patch_stride, cls=RoPEViTBackbone, **kwargs)
    assert isinstance(net, RoPEViTBackbone)
    if lean:
        net._apply(_unwritten_bf16)
    net.adapt(lora_rank, lora_alpha, lora_dropout)
    # Else nothing of the network would learn, adapters included.
    depth = len(net.encoder.block)
    learns = not (lora_rank and freeze_blocks in (-1, depth))
    allowed_blocks = f"0 to {depth - 1} beside LoRA's adapters"
    check_argument("freeze_blocks", freeze_blocks, learns, allowed_blocks)
    net.freeze(freeze_blocks)
    if net.window_size and len(net.global_blocks) == depth:
        logger.warning(
            "MODEL.ROPE_VIT.WINDOW_SIZE (%d) changes nothing: all %d blocks are global; "
            "MODEL.ROPE_VIT.GLOBAL_BLOCKS says which are",
            net.window_size,
            depth,
        )
    return net


def build_net(cfg: CfgNode, *, own_stride: bool = False) -> RoPEViTBackbone:
    """The network that MODEL.ROPE_VIT describes.

    Args:
        own_stride: whether what comes behind can take the network's own patch size as stride.

    Raises:
        InputError: for a wrong value; names the key and the allowed values.
    """
    check_rope_vit_config(cfg, own_stride=own_stride)
    warn_of_high_rate(cfg)
    options = cfg.MODEL.ROPE_VIT
    not_arguments = ("LORA", "CHECK_WEIGHTS")
    arguments = {k.lower(): v for k, v in options.items() if k not in not_arguments}
    arguments |= {f"lora_{key.lower()}": value for key, value in options.LORA.items()}
    if options.COMPILE is True and not cfg.MODEL.DEVICE.startswith("cuda"):
        arguments["compile"] = False
    try:
        net = create_backbone(**arguments)
    except ArgumentError as error:
        key = "MODEL.ROPE_VIT." + error.name.upper().replace("LORA_", "LORA.")
        value = get_key(cfg, key)
        raise InputError(f"{key} is {value!r}; allowed: {error.allowed}") from None
    if options.CHECK_WEIGHTS:
        net.settings = compared_settings(cfg)
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logger.info(
            "MODEL.BACKBONE.FREEZE_AT (%d) is meant for ResNets and not read; "
            "MODEL.ROPE_VIT.FREEZE_BLOCKS (%d) says what is frozen",
            cfg.MODEL.BACKBONE.FREEZE_AT,
            options.FREEZE_BLOCKS,
        )
    return net


@BACKBONE_REGISTRY.register()
def build_rope_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTNeck:
    """The neck alone, at stride 16 or the network's own patch size."""
    return RoPEViTNeck(build_net(cfg, own_stride=True))


@BACKBONE_REGISTRY.register()
def build_rope_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTPyramid:
    """p2 to p6, strides 4 to 64, for R-CNN heads (ViTDet, arXiv 2203.16527, section 3)."""
    return _build_pyramid(cfg, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_rope_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTPyramid:
    """p3 to p7, strides 8 to 128, for one-stage heads."""
    check_pyramid_config(cfg)
    width = cfg.MODEL.FPN.OUT_CHANNELS
    return _build_pyramid(cfg, (2.0, 1.0, 0.5), LastLevelP6P7(width, width, in_feature="p5"))


@BACKBONE_REGISTRY.register()
def build_res_rope_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTPyramid:
    """res2 to res5, strides 4 to 32, under the names that heads for a ResNet's stages ask for.

    DeepLab's, Mask2Former's, MaskDINO's; of Detectron2's own, only the levels that they read.
    """
    levels = levels_read(cfg, "build_res_rope_vit_sfp_backbone")
    return _build_pyramid(cfg, (4.0, 2.0, 1.0, 0.5), None, out_features=levels)


@BACKBONE_REGISTRY.register()
def build_rope_vit_sfp_backbone_for_heads(cfg: CfgNode, input_shape: ShapeSpec) -> RoPEViTPyramid:
    """The one of the pyramids above that has the features which the config's heads read.

    For configs made of parts, where one backbone stands under whatever heads come.

    Raises:
        InputError: no pyramid has what they read, as with C4 and DC5 heads.
    """
    return BACKBONE_REGISTRY.get(pyramid_for_heads(cfg))(cfg, input_shape)


def _build_pyramid(
    cfg: CfgNode,
    scale_factors: tuple[float, ...],
    top_block: nn.Module | None,
    out_features: Sequence[str] | None = None,
) -> RoPEViTPyramid:
    check_pyramid_config(cfg)
    return RoPEViTPyramid(
        build_net(cfg),
        in_feature="neck",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=scale_factors,
        top_block=top_block,
        # "" is the default meant for ResNets; ViTDet uses LN
        norm=heads.norm_by_name(cfg.MODEL.FPN.NORM or "LN"),
        out_features=out_features,
    )


def _check_scale(state_dict: dict[str, Tensor], key: str, own: Tensor) -> None:
    """Checks that adapters from a checkpoint count as much as the config says."""
    given = state_dict[key]
    if own.to(given) != given:  # as whoever wrote the file rounded it
        rank = len(state_dict[key.replace("lora_scale", "lora_a")])
        raise InputError(
            f"{key} is {given.item():.6g} in the checkpoint and {own.item():.6g} in the model: set "
            f"MODEL.ROPE_VIT.LORA.RANK {rank} MODEL.ROPE_VIT.LORA.ALPHA {given.item() * rank:.6g}"
        )


def _remedy(info: WeightsInfo | None) -> str:
    """What to do about weights that do not fit; they may have said what they are."""
    other = "MODEL.WEIGHTS to another checkpoint, or to '' to start from random weights"
    if info is None or not info.network:
        size = "" if info is None else f" (IMAGE_SIZE {list(info.image_size)})"
        return (
            f"set MODEL.ROPE_VIT.NAME and IMAGE_SIZE to what the checkpoint was made with{size}, "
            f"or {other}"
        )
    network = ("MODEL.ROPE_VIT.NAME", "MODEL.ROPE_VIT.IMAGE_SIZE")
    settings = settings_for(info)
    return f"set {as_arguments({key: settings[key] for key in network})}, or {other}"


def _unwritten_bf16(tensor: Tensor) -> Tensor:
    """Zeros in place of a tensor on the meta device: the system gives memory when it is written."""
    if not tensor.is_meta:
        return tensor.to(torch.bfloat16)
    return torch.from_numpy(np.zeros(tensor.shape, np.uint16)).view(torch.bfloat16)


def _shorten(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f", … and {len(keys) - most} more" if keys[most:] else "")

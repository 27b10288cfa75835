"""Detectron2's keys of meta architecture and heads: names, features, sizes."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from fvcore.common.registry import Registry

from ..config.detectron2_keys import Rule, check_rules, number, one_of, several, whole
from ..config.keys import (
    check_key,
    check_norm,
    check_pyramid_config,
    check_rope_vit_config,
    get_key,
)
from ..errors import InputError, did_you_mean
from ..pyramids import BACKBONES, check_features
from ..utils.arguments import is_number, is_whole_number

_RCNNS = ("GeneralizedRCNN", "PanopticFPN")
# Detectron2's, which read ROI_BOX_HEAD.NAME, empty by default; others may not.
_HEADS_WITH_BOX_HEAD = ("StandardROIHeads", "CascadeROIHeads", "RROIHeads")
_PRECOMPUTED = "PrecomputedProposals"

_SHARE = number(0, 1)
_LOSSES = one_of("smooth_l1", "giou", "diou", "ciou")
_POOLERS = one_of("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
_BOX_WEIGHTS = several(number(0, or_least=False), 4)
_CONVS = several(
    Rule(lambda value: value == -1 or is_whole_number(value, 1), "channels, or -1: as the input"),
    least=0,
)

_RPN = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": whole(1),
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _LOSSES,
    "MODEL.RPN.CONV_DIMS": _CONVS,
    **{
        f"MODEL.RPN.{stage}_NMS_TOPK_{phase}": whole(1)
        for stage in ("PRE", "POST")
        for phase in ("TRAIN", "TEST")
    },
}
_ROI_HEADS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": whole(1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": whole(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _LOSSES,
}
_BOX_HEAD = {
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": whole(1),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": whole(0),
    "MODEL.ROI_BOX_HEAD.NUM_FC": whole(0),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": whole(1),
    "MODEL.ROI_BOX_HEAD.FC_DIM": whole(1),
}
_MASK_HEAD = {
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": whole(1),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": whole(0),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": whole(1),
}
_KEYPOINT_HEAD = {
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": whole(1),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": whole(1),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": several(whole(1)),
}
_RETINANET = {
    "MODEL.RETINANET.NUM_CLASSES": whole(1),
    "MODEL.RETINANET.NUM_CONVS": whole(0),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _LOSSES,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": whole(1),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
}
_SEM_SEG = {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": whole(1),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": whole(1),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": whole(1),
}


def check_model(cfg: CfgNode) -> None:
    """Checks what a model is built from: what its builders would fail on, or take without a word.

    Names are looked up in Detectron2's registries as they are now, so those that the caller
    registered are known. Heads of meta architectures other than Detectron2's are theirs to check.

    Raises:
        InputError: names the key, its value and the allowed ones.
    """
    model = cfg.MODEL
    check_registered("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY)
    check_registered("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY)
    if model.BACKBONE.NAME in BACKBONES:
        has_pyramid = model.BACKBONE.NAME != "build_rope_vit_backbone"
        check_rope_vit_config(cfg, own_stride=not has_pyramid)
        if has_pyramid:
            check_pyramid_config(cfg)
    check_features(cfg)
    if model.META_ARCHITECTURE in (*_RCNNS, "ProposalNetwork"):
        _check_proposals(cfg)
    if model.META_ARCHITECTURE in _RCNNS:
        _check_roi_heads(cfg)
    if model.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
        name = model.SEM_SEG_HEAD.NAME
        check_registered("MODEL.SEM_SEG_HEAD.NAME", name, SEM_SEG_HEADS_REGISTRY)
        check_rules(cfg, _SEM_SEG)
        check_norm(cfg, "MODEL.SEM_SEG_HEAD.NORM", model.SEM_SEG_HEAD.CONVS_DIM)
    if model.META_ARCHITECTURE == "RetinaNet":
        check_rules(cfg, _RETINANET)
        _check_anchors(cfg, "MODEL.RETINANET")
        check_norm(cfg, "MODEL.RETINANET.NORM", model.FPN.OUT_CHANNELS)


def check_registered(key: str, name: str, registry: Registry) -> None:
    """
    Raises:
        InputError: the registry does not have the name; says which it has.
    """
    if name not in registry:
        known = [each for each, _ in registry]
        raise InputError(
            f"{key} is {name!r}{did_you_mean(name, known)}; registered are {', '.join(known)} "
            "(your own: import the module that registers it)"
        )


def _check_proposals(cfg: CfgNode) -> None:
    model, name = cfg.MODEL, cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if (name == _PRECOMPUTED) != model.LOAD_PROPOSALS:
        raise InputError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {name!r} and MODEL.LOAD_PROPOSALS "
            f"{model.LOAD_PROPOSALS}; {_PRECOMPUTED!r} and True go together"
        )
    if model.LOAD_PROPOSALS:
        for split in ("TRAIN", "TEST"):
            sets, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
            if len(sets) != len(files):
                raise InputError(
                    f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(sets)} "
                    f"datasets of DATASETS.{split}; MODEL.LOAD_PROPOSALS needs one for each"
                )
        return
    check_registered("MODEL.PROPOSAL_GENERATOR.NAME", name, PROPOSAL_GENERATOR_REGISTRY)
    if name == "RPN":
        check_registered("MODEL.RPN.HEAD_NAME", model.RPN.HEAD_NAME, RPN_HEAD_REGISTRY)
        check_rules(cfg, _RPN | {"MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS})
        _check_anchors(cfg, "MODEL.RPN")


def _check_anchors(cfg: CfgNode, reader: str) -> None:
    """The anchors of RPN or RetinaNet, and how they are matched to boxes."""
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    check_registered("MODEL.ANCHOR_GENERATOR.NAME", anchors.NAME, ANCHOR_GENERATOR_REGISTRY)
    if anchors.NAME == "DefaultAnchorGenerator":
        levels = len(get_key(cfg, f"{reader}.IN_FEATURES"))
        for key in ("SIZES", "ASPECT_RATIOS"):
            check_key(
                cfg,
                f"MODEL.ANCHOR_GENERATOR.{key}",
                _are_anchors(anchors[key], levels),
                f"one list of numbers above 0, or {levels}, one for each of {reader}.IN_FEATURES",
            )
        check_rules(cfg, {"MODEL.ANCHOR_GENERATOR.OFFSET": number(0, 0.999)})
    _check_matcher(cfg, reader)


def _are_anchors(value: Sequence, levels: int) -> bool:
    lists = value if value and isinstance(value[0], list | tuple) else [value]
    return len(lists) in (1, levels) and all(
        isinstance(each, list | tuple) and each and all(is_number(n) and n > 0 for n in each)
        for each in lists
    )


def _check_matcher(cfg: CfgNode, reader: str) -> None:
    thresholds = get_key(cfg, f"{reader}.IOU_THRESHOLDS")
    check_rules(
        cfg,
        {
            f"{reader}.IOU_THRESHOLDS": Rule(
                lambda value: (
                    several(_SHARE).holds(value) and 0 not in value and list(value) == sorted(value)
                ),
                "rising numbers above 0, up to 1",
            ),
            f"{reader}.IOU_LABELS": Rule(
                lambda value: (
                    len(value) == len(thresholds) + 1
                    and all(label in (-1, 0, 1) for label in value)
                ),
                f"one more than the {len(thresholds)} IOU_THRESHOLDS, each of: 0 (background), "
                "1 (object), -1 (ignored)",
            ),
        },
    )


def _check_roi_heads(cfg: CfgNode) -> None:
    model, name = cfg.MODEL, cfg.MODEL.ROI_HEADS.NAME
    check_registered("MODEL.ROI_HEADS.NAME", name, ROI_HEADS_REGISTRY)
    if name == "Res5ROIHeads" and model.BACKBONE.NAME in BACKBONES:
        raise InputError(
            "MODEL.ROI_HEADS.NAME is 'Res5ROIHeads', the last stage of a ResNet, which a RoPE ViT "
            "does not have; set it to StandardROIHeads, or start from an FPN config"
        )
    check_rules(cfg, _ROI_HEADS)
    _check_matcher(cfg, "MODEL.ROI_HEADS")
    _check_federated_loss(cfg)
    if name in _HEADS_WITH_BOX_HEAD:
        box = model.ROI_BOX_HEAD
        check_registered("MODEL.ROI_BOX_HEAD.NAME", box.NAME, ROI_BOX_HEAD_REGISTRY)
        check_rules(cfg, _BOX_HEAD)
        if name != "RROIHeads":
            check_rules(cfg, {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS})
        if box.NAME == "FastRCNNConvFCHead" and not box.NUM_CONV and not box.NUM_FC:
            raise InputError(
                "MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC are both 0; FastRCNNConvFCHead needs a "
                "layer: set MODEL.ROI_BOX_HEAD.NUM_FC 2, as in Detectron2's FPN configs"
            )
        if box.NUM_CONV:
            check_norm(cfg, "MODEL.ROI_BOX_HEAD.NORM", box.CONV_DIM)
    if name == "CascadeROIHeads":
        _check_cascade(cfg)
    if model.MASK_ON:
        mask = model.ROI_MASK_HEAD
        check_registered("MODEL.ROI_MASK_HEAD.NAME", mask.NAME, ROI_MASK_HEAD_REGISTRY)
        if mask.NAME == "MaskRCNNConvUpsampleHead":
            check_rules(cfg, _MASK_HEAD)
            check_norm(cfg, "MODEL.ROI_MASK_HEAD.NORM", mask.CONV_DIM)
    if model.KEYPOINT_ON:
        keypoint = model.ROI_KEYPOINT_HEAD
        name = keypoint.NAME
        check_registered("MODEL.ROI_KEYPOINT_HEAD.NAME", name, ROI_KEYPOINT_HEAD_REGISTRY)
        check_rules(cfg, _KEYPOINT_HEAD)
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        if sigmas and len(sigmas) != keypoint.NUM_KEYPOINTS:
            raise InputError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} numbers, "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoint.NUM_KEYPOINTS}; give one for "
                "each, or none for COCO's"
            )


def _check_federated_loss(cfg: CfgNode) -> None:
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.USE_FED_LOSS and not box.USE_SIGMOID_CE:
        raise InputError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS needs MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True"
        )


def _check_cascade(cfg: CfgNode) -> None:
    cascade, first = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise InputError(
            "MODEL.ROI_HEADS.NAME CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG "
            "True"
        )
    if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS) or list(cascade.IOUS[:1]) != list(first):
        raise InputError(
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {cascade.IOUS!r}; allowed: one for each of the "
            f"{len(cascade.BBOX_REG_WEIGHTS)} BBOX_REG_WEIGHTS, the first as in "
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS {first!r}"
        )

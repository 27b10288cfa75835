"""Which pyramid the heads of a config need."""

from detectron2.config import CfgNode
from torch import nn

from .errors import InputError

# Registered name: the features that it has.
PYRAMIDS = {
    "build_rope_vit_sfp_backbone": ("p2", "p3", "p4", "p5", "p6"),
    "build_retinanet_rope_vit_sfp_backbone": ("p3", "p4", "p5", "p6", "p7"),
}
# All that are registered.
BACKBONES = (*PYRAMIDS, "build_rope_vit_sfp_backbone_for_heads", "build_rope_vit_backbone")
_KNOWN_PACKAGES = ("detectron2", "fvcore", "rope_vit_det", "torch", "torchvision")
_RPN = "MODEL.RPN.IN_FEATURES"
_ROI_HEADS = "MODEL.ROI_HEADS.IN_FEATURES"
_SEM_SEG = "MODEL.SEM_SEG_HEAD.IN_FEATURES"
# The keys that Detectron2's meta architectures take their features from.
_READ_BY = {
    "GeneralizedRCNN": (_RPN, _ROI_HEADS),
    "PanopticFPN": (_RPN, _ROI_HEADS, _SEM_SEG),
    "ProposalNetwork": (_RPN,),
    "SemanticSegmentor": (_SEM_SEG,),
    "RetinaNet": ("MODEL.RETINANET.IN_FEATURES",),
}


def pyramid_for_heads(cfg: CfgNode) -> str:
    """The name under which the pyramid is registered that has all features the heads read.

    p2 to p6 where both do, and under meta architectures that are not Detectron2's (name the
    builder itself in MODEL.BACKBONE.NAME where they want p7).

    Raises:
        InputError: none has them.
    """
    wanted = _features_read(cfg)
    for name, features in PYRAMIDS.items():
        if all(set(levels) <= set(features) for levels in wanted.values()):
            return name
    asked = ", ".join(f"{key} {levels}" for key, levels in wanted.items())
    raise InputError(
        f"no pyramid of a RoPE ViT has the features of {asked}; start from an FPN or RetinaNet "
        "config (C4 and DC5 heads take a ResNet's own stages)"
    )


def check_features(cfg: CfgNode) -> None:
    """Checks that the backbone, if one of ours, has the features which the heads read.

    Raises:
        InputError: it has not; names the key, and a backbone that has them where there is one.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONES:
        return
    if name == "build_rope_vit_sfp_backbone_for_heads":
        name = pyramid_for_heads(cfg)
    features = PYRAMIDS.get(name, ("neck",))
    for key, levels in _features_read(cfg).items():
        if not levels or not set(levels) <= set(features):
            raise InputError(
                f"{key} is {levels!r}; allowed: {', '.join(features)}, the features of {name}"
                + _other_pyramid(cfg)
            )
        # A pooler chooses the level by the size of the box.
        first = features.index(levels[0])
        if key == _ROI_HEADS and levels != list(features[first : first + len(levels)]):
            raise InputError(
                f"{key} is {levels!r}; allowed: neighbours in the order {', '.join(features)}"
            )


def uses_all_parameters(model: nn.Module) -> bool | None:
    """Whether every trainable parameter of a built detector has part in its losses.

    Detectron2's heads use all of theirs; what they may leave out is a level of the pyramid, as the
    demo's R-CNN does with p7. Which levels they read, they say.

    Returns:
        None where that is not known: parts of the model are neither Detectron2's nor ours, or its
        heads say nothing.
    """
    for module in model.modules():
        if type(module).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            return None
    heads = (model, *model.children())
    named = [v for head in heads for k, v in vars(head).items() if k.endswith("in_features")]
    read = {level for levels in named if isinstance(levels, list | tuple) for level in levels}
    backbone = getattr(model, "backbone", None)
    if not read or backbone is None:
        return None
    for level in set(backbone.output_shape()) - read:
        # A pyramid's level is a stage's, or the top block's; of other backbones, all is in doubt.
        stage = getattr(backbone, "top_block", backbone)
        for prefix in ("simfp_", "fpn_output"):
            stage = getattr(backbone, prefix + level[1:], stage)
        if any(parameter.requires_grad for parameter in stage.parameters()):
            return False
    return True


class FeatureShapes(dict):
    """Shapes by feature, which for an unknown one say more than a KeyError."""

    def __missing__(self, name: str) -> None:
        raise InputError(
            f"the backbone has no feature {name!r}, only {', '.join(self)}; set the IN_FEATURES of "
            "the heads to these, or MODEL.BACKBONE.NAME to build_rope_vit_sfp_backbone (p2 to p6) "
            "or build_retinanet_rope_vit_sfp_backbone (p3 to p7)"
        )


def _features_read(cfg: CfgNode) -> dict[str, list[str]]:
    """The keys by which heads read features, and their values."""
    wanted = {}
    for key in _READ_BY.get(cfg.MODEL.META_ARCHITECTURE, ()):
        if key == _RPN and cfg.MODEL.PROPOSAL_GENERATOR.NAME != "RPN":
            continue  # precomputed proposals
        _, section, name = key.split(".")
        wanted[key] = list(cfg.MODEL[section][name])
    return wanted


def _other_pyramid(cfg: CfgNode) -> str:
    try:
        return f"; or set MODEL.BACKBONE.NAME {pyramid_for_heads(cfg)}, which has them"
    except InputError:
        return ""

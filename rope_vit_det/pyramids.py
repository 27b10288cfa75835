"""Which pyramid the heads of a config need."""

from detectron2.config import CfgNode, get_cfg
from torch import nn

from .errors import InputError

# Registered name: the features that it has.
PYRAMIDS = {
    "build_rope_vit_sfp_backbone": ("p2", "p3", "p4", "p5", "p6"),
    "build_retinanet_rope_vit_sfp_backbone": ("p3", "p4", "p5", "p6", "p7"),
    "build_res_rope_vit_sfp_backbone": ("res2", "res3", "res4", "res5"),
}
_RANGES = ", ".join(f"{name} ({levels[0]} to {levels[-1]})" for name, levels in PYRAMIDS.items())
# All that are registered.
BACKBONES = (*PYRAMIDS, "build_rope_vit_sfp_backbone_for_heads", "build_rope_vit_backbone")
_KNOWN_PACKAGES = {"detectron2", "fvcore", "rope_vit_det", "torch", "torchvision"}
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
    "PanopticDeepLab": (_SEM_SEG, "MODEL.INS_EMBED_HEAD.IN_FEATURES"),
}


def pyramid_for_heads(cfg: CfgNode) -> str:
    """The name under which the pyramid is registered that has all features the heads read.

    p2 to p6 where several do. What meta architectures of other projects read is taken from the
    IN_FEATURES that the config, or the project, has set.

    Raises:
        InputError: none has them.
    """
    wanted = _features_read(cfg) or _features_set(cfg)
    # The heads of C4 and DC5 configs stand for a ResNet's own stage, not for one level of several.
    one_stage = any(len(wanted.get(key, ())) == 1 for key in (_RPN, _ROI_HEADS))
    for name, features in PYRAMIDS.items():
        if one_stage and "res4" in features:
            continue
        if all(set(levels) <= set(features) for levels in wanted.values()):
            return name
    asked = ", ".join(f"{key} {levels}" for key, levels in wanted.items())
    raise InputError(
        f"no pyramid of a RoPE ViT has the features of {asked}; start from an FPN or RetinaNet "
        "config (C4 and DC5 heads take a ResNet's own stages), or set these keys to features of "
        f"one pyramid: {_RANGES}"
    )


def levels_read(cfg: CfgNode, name: str) -> list[str]:
    """The levels of a registered pyramid that the heads read, by stride.

    Those of no head would be unused parameters, which end a training under DDP. All of them where
    the heads are not Detectron2's.
    """
    read = {level for levels in _features_read(cfg).values() for level in levels}
    return [level for level in PYRAMIDS[name] if level in read] or list(PYRAMIDS[name])


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
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    heads = (model, *model.children())
    named = [v for head in heads for k, v in vars(head).items() if k.endswith("in_features")]
    read = {level for levels in named if isinstance(levels, list | tuple) for level in levels}
    backbone = getattr(model, "backbone", None)
    if not packages <= _KNOWN_PACKAGES or not read or backbone is None:
        return None
    for level in set(backbone.output_shape()) - read:
        # A pyramid's level is a stage's, or the top block's; of other backbones, all is in doubt.
        stage = getattr(backbone, "top_block", backbone)
        for prefix in ("simfp_", "fpn_output"):
            number = level.removeprefix("res").removeprefix("p")
            stage = getattr(backbone, prefix + number, stage)
        if any(parameter.requires_grad for parameter in stage.parameters()):
            return False
    return True


class FeatureShapes(dict):
    """Shapes by feature, which for an unknown one say more than a KeyError."""

    def __missing__(self, name: str) -> None:
        raise InputError(
            f"the backbone has no feature {name!r}, only {', '.join(self)}; set the IN_FEATURES of "
            f"the heads to these, or MODEL.BACKBONE.NAME to one of {_RANGES}"
        )


def _features_read(cfg: CfgNode) -> dict[str, list[str]]:
    """The keys by which heads of Detectron2's read features, and their values."""
    # Not before: it registers the backbones, which import this module.
    from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN

    wanted = {}
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    generator = PROPOSAL_GENERATOR_REGISTRY.get(name) if name in PROPOSAL_GENERATOR_REGISTRY else 0
    is_rpn = isinstance(generator, type) and issubclass(generator, RPN)
    for key in _READ_BY.get(cfg.MODEL.META_ARCHITECTURE, ()):
        if key == _RPN and not is_rpn:  # another project's, or none
            key = f"MODEL.{name.upper()}.IN_FEATURES"
        _, section, name = key.split(".")
        if name in cfg.MODEL.get(section, {}):
            wanted[key] = list(cfg.MODEL[section][name])
    return wanted


def _features_set(cfg: CfgNode) -> dict[str, list[str]]:
    """The keys by which other heads may read features: of sections that are not all defaults.

    Detectron2's own sections are in every config, whoever reads them. Those of necks (FPN, BIFPN)
    read the backbone that ours replaces.
    """
    defaults = get_cfg().MODEL
    wanted: dict[str, list[str]] = {}
    for section, keys in cfg.MODEL.items():
        if isinstance(keys, CfgNode) and not section.upper().endswith("FPN"):
            levels = {key: value for key, value in keys.items() if key.endswith("IN_FEATURES")}
            if any(defaults.get(section, {}).get(key) != value for key, value in levels.items()):
                wanted |= {f"MODEL.{section}.{key}": list(v) for key, v in levels.items()}
    return wanted


def _other_pyramid(cfg: CfgNode) -> str:
    try:
        return f"; or set MODEL.BACKBONE.NAME {pyramid_for_heads(cfg)}, which has them"
    except InputError:
        return ""

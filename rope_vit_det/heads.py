"""Which pyramid the heads of a config need."""

from detectron2.config import CfgNode

from .errors import InputError

# Registered name: the features that it has.
PYRAMIDS = {
    "build_rope_vit_sfp_backbone": ("p2", "p3", "p4", "p5", "p6"),
    "build_retinanet_rope_vit_sfp_backbone": ("p3", "p4", "p5", "p6", "p7"),
}
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
    architecture = cfg.MODEL.META_ARCHITECTURE
    wanted = {}
    for key in _READ_BY.get(architecture, ()):
        if key == _RPN and cfg.MODEL.PROPOSAL_GENERATOR.NAME != "RPN":
            continue  # precomputed proposals
        _, section, name = key.split(".")
        wanted[key] = list(cfg.MODEL[section][name])
    for name, features in PYRAMIDS.items():
        if all(set(levels) <= set(features) for levels in wanted.values()):
            return name
    asked = ", ".join(f"{key} {levels}" for key, levels in wanted.items())
    raise InputError(
        f"no pyramid of a RoPE ViT has the features of {asked}; start from an FPN or RetinaNet "
        "config (C4 and DC5 heads take a ResNet's own stages)"
    )

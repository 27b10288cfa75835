# Parts that the LazyConfigs share: what Base-RoPE-ViT.yaml is to the yaml files.
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from rope_vit_det import RoPEViTPyramid, create_backbone
from rope_vit_det.heads import (
    FastBoxHead,
    FastCascadeROIHeads,
    FastLayerNorm,
    FastMaskHead,
    FastROIHeads,
    FastRPN,
)
from rope_vit_det.solver.optimizers import parameter_groups

net = L(create_backbone)(
    name="rope_vit_reg4_b14",
    image_size=None,
    pt_grid_size=None,
    # windows of the pretraining grid (16 x 16), four blocks over the whole image
    window_size=16,
    global_blocks=None,
    drop_path_rate=None,
    freeze_blocks=0,
    activation_checkpoint=False,
    compile=torch.cuda.device_count() > 0,
)

# p2 to p6 (ViTDet, arXiv 2203.16527, section 3)
pyramid = L(RoPEViTPyramid)(
    net=net,
    in_feature="neck",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm=FastLayerNorm,
)

# p3 to p7, for one-stage heads
retinanet_pyramid = L(RoPEViTPyramid)(
    net=net,
    in_feature="neck",
    out_channels=256,
    scale_factors=(2.0, 1.0, 0.5),
    top_block=L(LastLevelP6P7)(
        in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
    ),
    norm=FastLayerNorm,
)


def with_fast_heads(model):
    """Detectron2's heads of an R-CNN with LayerNorm, faster on GPUs; changes the model."""
    heads = model.roi_heads
    model.proposal_generator._target_ = FastRPN
    heads._target_ = FastCascadeROIHeads if "box_heads" in heads else FastROIHeads
    for head in heads.box_heads if "box_heads" in heads else [heads.box_head]:
        head._target_, head.conv_norm = FastBoxHead, FastLayerNorm
    heads.mask_head._target_, heads.mask_head.conv_norm = FastMaskHead, FastLayerNorm
    return model


# birder's default RGB statistics, to be confirmed by the file's own rgb_stats
pixels = dict(mean=[132.37, 135.30, 124.36], std=[59.06, 58.75, 65.99], format="RGB")

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "birder://rope_vit_reg4_b14_capi-imagenet21k"
# False: go on where the weights were trained with other pixels or settings than are set here
train.check_weights = True
train.amp.enabled = True
train.amp.dtype = "bfloat16"

# AdamW; weight decay and layer decay as ViTDet's ViT-B (arXiv 2203.16527, appendix A.2)
optimizer = L(torch.optim.AdamW)(
    params=L(parameter_groups)(
        # params.model is set before the optimizer is built
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        layer_decay=0.7,
    ),
    # one kernel for all weights on GPUs; None, on the CPU: as torch does
    fused=torch.cuda.device_count() > 0 or None,
    lr=1e-4,
    weight_decay=0.1,
)

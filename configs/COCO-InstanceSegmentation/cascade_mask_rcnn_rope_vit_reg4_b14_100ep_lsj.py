# COCO Cascade Mask R-CNN as in ViTDet (arXiv 2203.16527, table 5 and appendix A.2; values of
# Detectron2's projects/ViTDet/configs/COCO/cascade_mask_rcnn_vitdet_b_100ep.py), on Detectron2's
# common/models/cascade_rcnn.py. The same as cascade_mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml.
from detectron2 import model_zoo

from ..common.rope_vit_reg4_b14 import pixels, with_fast_heads
from .mask_rcnn_rope_vit_reg4_b14_100ep_lsj import dataloader, lr_multiplier, optimizer, train
from .mask_rcnn_rope_vit_reg4_b14_100ep_lsj import model as mask_rcnn

model = with_fast_heads(model_zoo.get_config("common/models/cascade_rcnn.py").model)
model.backbone = mask_rcnn.backbone
model.pixel_mean, model.pixel_std, model.input_format = pixels.mean, pixels.std, pixels.format

# two convolutions in the RPN, 4conv1fc box heads, LayerNorm in the heads
model.proposal_generator.head.conv_dims = [-1, -1]
for head in model.roi_heads.box_heads:
    head.conv_dims, head.fc_dims = [256, 256, 256, 256], [1024]

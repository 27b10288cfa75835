# COCO Mask R-CNN as in ViTDet: 100 epochs, large-scale jitter at 1024 (arXiv 2203.16527, appendix
# A.2; values of Detectron2's projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py). The same as
# mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.coco_lsj import dataloader
from ..common.rope_vit_reg4_b14 import optimizer, pixels, pyramid, train, with_fast_heads

model = with_fast_heads(model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model)
model.backbone = pyramid
model.backbone.net.drop_path_rate = 0.1
model.pixel_mean, model.pixel_std, model.input_format = pixels.mean, pixels.std, pixels.format

# 100 epochs = 184375 iterations x 64 images / 118000 images
train.max_iter = 184375
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
optimizer.lr = 1e-4

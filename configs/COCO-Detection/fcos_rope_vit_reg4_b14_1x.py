# COCO FCOS, 12 epochs: head, data and schedule of Detectron2's model zoo (common/models/fcos.py,
# COCO-Detection/fcos_R_50_FPN_1x.py), pyramid and optimizer of ViTDet (arXiv 2203.16527, section 3
# and appendix A.2).
from detectron2 import model_zoo

from ..common.rope_vit_reg4_b14 import optimizer, pixels, retinanet_pyramid, train

model = model_zoo.get_config("common/models/fcos.py").model
model.backbone = retinanet_pyramid
model.pixel_mean, model.pixel_std = pixels.mean, pixels.std

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = pixels.format
dataloader.train.mapper.use_instance_mask = False

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train.max_iter = 90000
# Detectron2's FCOS hands boxes of mixed precision to fvcore's GIoU loss, which takes only one
train.amp.enabled = False
# 1e-4 is for a batch of 64; scaled by the square root to 16, as Adam wants it (arXiv 2205.10287)
optimizer.lr = 5e-5

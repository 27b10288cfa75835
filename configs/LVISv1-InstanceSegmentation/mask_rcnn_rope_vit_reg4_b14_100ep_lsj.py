# LVIS v1 Mask R-CNN as in ViTDet: federated loss (arXiv 2103.07461) and repeat-factor sampling
# (arXiv 1908.03195, appendix B), 100 epochs, large-scale jitter (arXiv 2203.16527, appendix A.2;
# values of Detectron2's projects/ViTDet/configs/LVIS/mask_rcnn_vitdet_b_100ep.py). The same as
# mask_rcnn_rope_vit_reg4_b14_100ep_lsj.yaml.
from functools import partial

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import LVISEvaluator

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load_rel(
    "../COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py",
    ("dataloader", "lr_multiplier", "model", "optimizer", "train"),
)

dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    )
)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(LVISEvaluator)(
    dataset_name="${..test.dataset.names}", max_dets_per_image=300
)

model.roi_heads.num_classes = 1203
predictor = model.roi_heads.box_predictor
predictor.test_score_thresh = 0.02
predictor.test_topk_per_image = 300
predictor.use_sigmoid_ce = True
predictor.use_fed_loss = True
predictor.fed_loss_num_classes = 50
# frequencies of these classes; not those of another dataset that an override names
predictor.get_fed_loss_cls_weights = partial(get_fed_loss_cls_weights, "lvis_v1_train", 0.5)

# 100 epochs = 156250 iterations x 64 images / 100000 images
train.max_iter = 156250
train.eval_period = 30000
lr_multiplier.scheduler.milestones = [138889, 150463]
lr_multiplier.scheduler.num_updates = train.max_iter
lr_multiplier.warmup_length = 250 / train.max_iter
optimizer.lr = 2e-4

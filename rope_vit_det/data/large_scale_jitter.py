"""Training data under INPUT: Detectron2's mapper, with large-scale jitter where it is asked for."""

import detectron2.data.transforms as T
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper for training, with the augmentation that INPUT describes.

    Under INPUT.LSJ.ENABLED, large-scale jitter takes the place of INPUT.MIN_SIZE_TRAIN: see
    :func:`large_scale_jitter`. Boxes are then computed anew from the cropped masks, as for
    INPUT.CROP.
    """
    if not cfg.INPUT.LSJ.ENABLED:
        return DatasetMapper(cfg, is_train=True)
    arguments = DatasetMapper.from_config(cfg, is_train=True)
    # Detectron2's list is the resizing, then the flip that INPUT.RANDOM_FLIP asks for.
    flips = [a for a in build_augmentation(cfg, is_train=True) if isinstance(a, T.RandomFlip)]
    options = cfg.INPUT.LSJ
    jitter = large_scale_jitter(options.IMAGE_SIZE, options.MIN_SCALE, options.MAX_SCALE)
    arguments["augmentations"] = [*jitter, *flips]
    arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
    return DatasetMapper(**arguments)


def large_scale_jitter(
    image_size: int, min_scale: float = 0.1, max_scale: float = 2.0
) -> list[T.Augmentation]:
    """Resizing by a random scale, then a crop or padding to a square.

    As in Detectron2's `new_baselines` and ViTDet (arXiv 2012.07177, section 3; 2203.16527,
    appendix A.2). Padding lies right and below and is 128 in the image, "ignore" in semantic maps.

    Args:
        image_size: pixels of a side of the square.
        min_scale, max_scale: range of the scale, relative to the image fitted into the square.
    """
    return [
        T.ResizeScale(min_scale, max_scale, image_size, image_size),
        T.FixedSizeCrop((image_size, image_size)),
    ]

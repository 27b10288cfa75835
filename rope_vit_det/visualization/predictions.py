"""Drawing what a detector found."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

from ..data.rle_masks import RLEMasks, encode_part
from .colours import class_metadata
from .sheets import fit_scale, make_sheet, readable_scale, write_picture

# Pixels; an image is enlarged until it meets one of the two.
_PANEL = (440, 400)
_PAIRS_A_ROW = 2
_LARGEST = 1600  # pixels of a picture's longer side


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, scale: float = 1.0
) -> np.ndarray:
    """Boxes, masks, class names and scores over an image.

    Args:
        image: RGB, (H, W, 3) uint8.
        instances: on the CPU, in the size of the image.
        metadata: of :func:`~rope_vit_det.visualization.colours.class_metadata`.
        scale: of the result.
    """
    canvas = Visualizer(image, metadata, scale, instance_mode=ColorMode.SEGMENTATION)
    return canvas.draw_instance_predictions(instances).get_image()


def draw_picture(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """:func:`draw_instances` at a size to look at: small images enlarged, large ones reduced."""
    height, width = size = image.shape[:2]
    scale = min(1.0, _LARGEST / max(size))
    if scale < 1:
        sides = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
        found, instances = instances, Instances(image.shape[:2], **instances.get_fields())
        instances.pred_boxes = found.pred_boxes.clone()
        instances.pred_boxes.scale(sides[0] / width, sides[1] / height)
        if found.has("pred_masks"):
            masks = found.pred_masks
            if not isinstance(masks, RLEMasks):
                masks = RLEMasks(
                    [encode_part(np.asarray(each), 0, 0, size) for each in masks], size
                )
            instances.pred_masks = masks.resized(image.shape[:2])
        if found.has("pred_keypoints"):
            ratios = torch.tensor([sides[0] / width, sides[1] / height, 1.0])
            instances.pred_keypoints = found.pred_keypoints * ratios
    return draw_instances(image, instances, metadata, readable_scale(image))


def draw_predictions(
    images: Sequence[Mapping[str, Any]],
    predictions: Sequence[Instances],
    class_names: Sequence[str],
    out: str | os.PathLike,
    *,
    min_score: float = 0.5,
) -> None:
    """Draws ground truth (left) beside predictions (right), two images a row.

    Args:
        images: Detectron2 dataset dicts with annotations.
        predictions: a detector's output for each, in the image's own size.
        out: the PNG to write.
        min_score: predictions below are not drawn.
    """
    metadata = class_metadata(class_names)
    panels = []
    for image, found in zip(images, predictions, strict=True):
        pixels = read_image(image["file_name"], "RGB")
        scale = fit_scale(pixels, _PANEL)
        truth = Visualizer(pixels, metadata, scale, instance_mode=ColorMode.SEGMENTATION)
        panels.append(truth.draw_dataset_dict(dict(image)).get_image())
        panels.append(draw_instances(pixels, found[found.scores >= min_score], metadata, scale))
    columns = 2 * min(_PAIRS_A_ROW, len(images))
    captions = ["ground truth", "predictions"] * _PAIRS_A_ROW
    write_picture(make_sheet(panels, columns, _PANEL[0], captions), out)

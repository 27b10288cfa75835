"""Drawing what a detector found."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

from ..data.rle_masks import reduced, resized
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
    picture = reduced(image, _LARGEST)
    if picture is not image:
        instances = resized(instances, picture.shape[:2])
    return draw_instances(picture, instances, metadata, readable_scale(picture))


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
    captions = ["ground truth", "predictions"] * _PAIRS_A_ROW
    write_picture(make_sheet(panels, len(captions), _PANEL[0], captions), out)

"""From an image file to the network's input, as birder prepares it."""

from collections.abc import Sequence

import torch
from torchvision.transforms import v2


def classification_transform(
    size: tuple[int, int], rgb_mean: Sequence[float], rgb_std: Sequence[float]
) -> v2.Compose:
    """PIL image to normalised tensor (3, H, W); birder's `inference_preset`.

    Args:
        size: (H, W) in pixels. The whole image is resized to it, its aspect ratio is not kept.
        rgb_mean, rgb_std: of a :class:`~rope_vit_det.weights.WeightsInfo`, for values from 0 to 1.
    """
    return v2.Compose(
        [
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(rgb_mean), std=list(rgb_std)),
        ]
    )

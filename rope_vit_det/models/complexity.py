"""How much a network computes, and how many parameters it has, without computing anything."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .variants import create_model


def count_parameters(name: str, **kwargs: Any) -> int:
    """Parameters of :func:`create_model` with these arguments."""
    with torch.device("meta"):
        model = create_model(name, **kwargs)
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(name: str, height: int, width: int, **kwargs: Any) -> int:
    """Multiply-adds of :meth:`RoPEViT.detection_features` for one image.

    Products of matrices and convolutions count, those within attention included. Norms,
    activations, rotation and resampling, which are linear in the tokens and small, do not.

    Args:
        name, kwargs: of :func:`create_model`.
        height, width: of the image in pixels, multiples of the patch stride.
    """
    with torch.device("meta"), torch.inference_mode():
        model = create_model(name, **kwargs, features_only=True)
        image = torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as counter:
            model.detection_features(image)
    return counter.get_total_flops() // 2  # a multiply-add is two operations

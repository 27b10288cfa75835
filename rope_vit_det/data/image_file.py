"""Reading an image file as the training does."""

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..errors import InputError
from ..images import check_depth, describe_read_error


def read_rgb(path: str) -> np.ndarray:
    """An image file as RGB, (H, W, 3) uint8, turned as its EXIF data say: as in the training.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            check_depth(image)
        return read_image(path, "RGB")
    except Exception as error:  # PIL's plugins raise whatever a damaged file leads them to
        raise InputError(f"{path}: {describe_read_error(path, error)}") from None

"""Large images through a predictor in overlapping slices."""

import numpy as np
from detectron2.structures import Instances

from ..evaluation.slicing import check_slicing, find_in_slices
from .predictor import Predictor


class SlicedPredictor:
    """A predictor whose images go through it in slices and, once more, whole.

    What several slices find is merged: see
    :func:`~rope_vit_det.evaluation.slicing.find_in_slices`. Masks are
    :class:`~rope_vit_det.data.rle_masks.RLEMasks`: pixels are made on demand.
    """

    def __init__(self, predictor: Predictor, side: int) -> None:
        """
        Args:
            side: pixels of a slice's side; slices overlap by TEST.SLICE.OVERLAP of it.
        """
        check_slicing(side)
        self._predictor = predictor
        self._options = {
            "side": side,
            "overlap": predictor.cfg.TEST.SLICE.OVERLAP,
            "longest": predictor.cfg.INPUT.MAX_SIZE_TEST,
        }

    def predict(self, images: list[np.ndarray], *, channel_order: str = "RGB") -> list[Instances]:
        """See :meth:`Predictor.predict`; takes arrays only."""
        rgb = [each if channel_order == "RGB" else each[:, :, ::-1] for each in images]
        return [find_in_slices(each, self._predictor, **self._options) for each in rgb]

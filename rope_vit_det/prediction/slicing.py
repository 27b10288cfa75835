"""Large images in overlapping slices, through SAHI (arXiv 2202.06934)."""

import importlib.util
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from ..errors import InputError
from .predictor import Predictor

_MIN_SIDE = 32


def check_slicing(side: int) -> None:
    """Finds out before the work whether images can be sliced.

    Raises:
        InputError: SAHI is not installed, or the slices would be too small.
    """
    if importlib.util.find_spec("sahi") is None:
        raise InputError("--slice needs the package sahi; pip install sahi")
    if side < _MIN_SIDE:
        raise InputError(f"--slice takes the side of a slice, {_MIN_SIDE} pixels or more")


class SlicedPredictor:
    """A predictor whose images go through it in slices and, once more, whole.

    What several slices find is merged as SAHI does by default; of a network with masks, boxes are
    those around the merged masks.
    """

    def __init__(self, predictor: Predictor, side: int) -> None:
        """
        Args:
            side: pixels of a slice's side; slices overlap by a fifth of it.
        """
        check_slicing(side)
        self._predictor = predictor
        self._side = side
        self._model = _sahi_model(predictor)

    def predict(self, images: list[np.ndarray], *, channel_order: str = "RGB") -> list[Instances]:
        """See :meth:`Predictor.predict`; takes arrays only."""
        return [
            self._predict(each if channel_order == "RGB" else each[:, :, ::-1]) for each in images
        ]

    def _predict(self, image: np.ndarray) -> Instances:
        from sahi.predict import get_sliced_prediction

        found = get_sliced_prediction(
            np.ascontiguousarray(image),
            self._model,
            slice_height=self._side,
            slice_width=self._side,
            verbose=0,
        ).object_prediction_list
        result = Instances(image.shape[:2])
        result.scores = torch.tensor([float(each.score.value) for each in found])
        result.pred_classes = torch.tensor([each.category.id for each in found], dtype=torch.int64)
        if self._predictor.cfg.MODEL.MASK_ON:
            masks = [np.asarray(each.mask.bool_mask) for each in found]
            result.pred_masks = torch.from_numpy(
                np.array(masks, bool).reshape(-1, *image.shape[:2])
            )
            # SAHI's own boxes end on the centres of a mask's last pixels.
            result.pred_boxes = BitMasks(result.pred_masks).get_bounding_boxes()
        else:
            boxes = [each.bbox.to_xyxy() for each in found]
            result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        return result


def _sahi_model(predictor: Predictor) -> Any:
    from sahi.models.detectron2 import Detectron2DetectionModel

    class Model(Detectron2DetectionModel):
        """SAHI's own for Detectron2, except for where the network comes from."""

        required_packages = ()

        def load_model(self) -> None:
            self.model = _Detectron2Like(predictor)
            self.category_mapping = {
                str(i): name for i, name in enumerate(predictor.classes["names"])
            }
            self.category_names = list(predictor.classes["names"])

    return Model(confidence_threshold=predictor.threshold, device=str(predictor.device))


class _Detectron2Like:
    """Has of Detectron2's :class:`DefaultPredictor` what SAHI uses; images are RGB."""

    input_format = "RGB"

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def __call__(self, image: np.ndarray) -> dict[str, Instances]:
        return {"instances": self._predictor(image)}

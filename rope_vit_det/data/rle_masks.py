"""What is found in large images: masks as COCO's run lengths, and copies of another size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def encode_part(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's RLE of a mask that is empty but for a part, without its pixels ever being there.

    Args:
        part: (h, w), bool or 0 and 1.
        left, top: where it lies; it must not reach out.
        size: (height, width) of the whole.
    """
    height, width = size
    rows, columns = (np.flatnonzero(part.any(axis=axis)) for axis in (1, 0))
    if len(rows):  # only what is around the object: it is small as a rule
        left, top = left + columns[0], top + rows[0]
        part = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    columns = np.zeros((part.shape[1], part.shape[0] + 2), np.int8)
    columns[:, 1:-1] = part.T
    # Column by column, a start and an end in turn; a run does not end where the next one starts.
    x, y = np.nonzero(np.diff(columns, axis=1))
    edges = (x + left) * height + y + top
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2
    edges = np.delete(edges, np.concatenate((joined + 1, joined + 2)))
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    if len(counts) > 1 and not counts[-1]:
        counts.pop()
    return as_rle({"counts": counts, "size": [height, width]})


def as_rle(mask: Mapping[str, Any]) -> dict[str, Any]:
    """An annotation's RLE, compressed, its counts a text, as JSON takes it."""
    counts = mask["counts"]
    if not isinstance(counts, str | bytes):
        whole = {"size": mask["size"], "counts": [*counts]}
        counts = mask_util.frPyObjects(whole, *mask["size"])["counts"]
    text = counts if isinstance(counts, str) else counts.decode()
    return {"size": [int(side) for side in mask["size"]], "counts": text}


def box_of(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the pixels, the last two exclusive; zeros where there is none."""
    x, y, width, height = (int(value) for value in mask_util.toBbox(rle))
    return x, y, x + width, y + height


def decode_part(rle: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """The pixels of a mask within its box, (h, w) uint8, and the box's left and top."""
    x0, y0, x1, y1 = box_of(rle)
    return mask_util.decode(rle)[y0:y1, x0:x1].copy(), x0, y0


class RLEMasks:
    """The masks of an image as COCO's RLE.

    It stands for a tensor (N, H, W) of bool in `Instances.pred_masks`: iterating, or an index that
    is a number, gives one mask's pixels, `tensor` and NumPy's `asarray` those of all.
    """

    def __init__(self, rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> None:
        """
        Args:
            rles: compressed, of `size`.
            size: (height, width) of the image.
        """
        self.rles = list(rles)
        self.size = size

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self), *self.size

    @property
    def tensor(self) -> Tensor:
        """(N, H, W) bool."""
        return torch.from_numpy(np.asarray(self))

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int | np.integer):
            return torch.from_numpy(mask_util.decode(self.rles[item]).astype(bool))
        indices = np.arange(len(self))[item.numpy() if isinstance(item, Tensor) else item]
        return RLEMasks([self.rles[i] for i in indices], self.size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        masks = np.zeros(self.shape, bool)
        for i, rle in enumerate(self.rles):
            masks[i] = mask_util.decode(rle)
        return masks if dtype is None else masks.astype(dtype)

    def to(self, *args: Any, **kwargs: Any) -> "RLEMasks":
        return self

    cpu = to

    def numpy(self) -> np.ndarray:
        return np.asarray(self)

    @staticmethod
    def cat(parts: "Sequence[RLEMasks]") -> "RLEMasks":
        """Of one image, as `Instances.cat` asks for."""
        return RLEMasks([rle for part in parts for rle in part.rles], parts[0].size)

    def resized(self, size: tuple[int, int]) -> "RLEMasks":
        """The masks in a larger or smaller copy of the image, (height, width)."""
        if size == self.size:
            return self
        scale = np.array([size[1] / self.size[1], size[0] / self.size[0]])
        rles = []
        for rle in self.rles:
            part, left, top = decode_part(rle)
            low = np.floor((left, top) * scale).astype(int)
            high = np.ceil((np.array([left, top]) + part.shape[::-1]) * scale).astype(int)
            high = np.minimum(high, size[::-1])
            if part.size:
                shape = tuple(int(side) for side in high - low)
                part = cv2.resize(part * 255, shape, interpolation=cv2.INTER_LINEAR) > 127
            rles.append(encode_part(part, int(low[0]), int(low[1]), size))
        return RLEMasks(rles, size)


def resized(found: Instances, size: tuple[int, int]) -> Instances:
    """What was found in an image, in the coordinates of a larger or smaller copy of it.

    Args:
        found: with `pred_boxes` and, where there are some, `pred_masks` and `pred_keypoints`.
        size: (height, width) of the copy.

    Returns:
        Masks as :class:`RLEMasks`.
    """
    height, width = found.image_size
    scale = torch.tensor([size[1] / width, size[0] / height])
    result = Instances(size, **found.get_fields())
    result.pred_boxes = Boxes(found.pred_boxes.tensor * scale.repeat(2))
    if found.has("pred_keypoints"):
        result.pred_keypoints = found.pred_keypoints * torch.cat((scale, torch.ones(1)))
    if found.has("pred_masks"):
        masks = found.pred_masks
        if not isinstance(masks, RLEMasks):
            rles = [encode_part(np.asarray(mask), 0, 0, found.image_size) for mask in masks]
            masks = RLEMasks(rles, found.image_size)
        result.pred_masks = masks.resized(size)
    return result


def reduced(pixels: np.ndarray, longest: int) -> np.ndarray:
    """An image (H, W, C) whose longer side has so many pixels at most."""
    scale = longest / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)

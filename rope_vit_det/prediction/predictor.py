"""A trained detector, from images to Detectron2's Instances."""

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from PIL import Image

from ..config.keys import MIN_SLICE
from ..errors import InputError, check_packages
from ..evaluation.slicing import in_slices
from ..utils.device import find_device
from ..utils.image_files import READERS, any_number_of_pixels, read_rgb
from ..utils.memory import bound_caches
from ..visualization.colours import class_metadata
from .load_detector import load_detector, read_detector_config

if TYPE_CHECKING:
    import supervision

ImageLike: TypeAlias = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
# Detectron2's input: "image" (3, h, w) uint8, and "height" and "width" of the result.
Prepared: TypeAlias = dict[str, Any]

# Keys that have an argument here, and its names.
_SETTLED = {
    "MODEL.DEVICE": "give --device (in Python, device)",
    "TEST.AUG.ENABLED": "give --tta (in Python, tta)",
    "TEST.SLICE.ENABLED": "give --slice (in Python, slice_side)",
    "TEST.SLICE.SIZE": "give --slice (in Python, slice_side)",
}


class Predictor:
    """A trained detector for images of any size.

    The results are those of Detectron2's :class:`DefaultPredictor`, which takes BGR arrays only.

    Attributes:
        cfg: the config.
        model: Detectron2's, in evaluation mode.
        classes: names, and the ids of the dataset, of classes 0, 1, …
        metadata: Detectron2's, for drawing.
        threshold: least score of a detection.
    """

    def __init__(
        self,
        config_or_dir: str | os.PathLike,
        weights: str | os.PathLike | None = None,
        *,
        opts: Sequence[str] = (),
        threshold: float = 0.5,
        categories: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        tta: bool = False,
        bf16: bool = False,
        slice_side: int | None = None,
    ) -> None:
        """
        Args:
            config_or_dir: a yaml config, or the OUTPUT_DIR of a training.
            weights: a checkpoint; None: of a folder, model_best.pth, else model_final.pth, else the
                last; of a config, what it names.
            opts: KEY VALUE pairs over the config, but for what an argument says. The config's
                COMPILE is not obeyed: MODEL.ROPE_VIT.COMPILE True is asked for here.
            threshold: least score of a detection.
            categories: a COCO file with the classes, for a checkpoint that does not hold them.
            device: None: the GPU where there is one, else the CPU.
            tta: Detectron2's test-time augmentation, over the scales and flips of TEST.AUG.
            bf16: under torch's autocast to bfloat16, which the RoPE ViT leaves aside on CPUs whose
                bfloat16 products are slow.
            slice_side: pixels of the side of the slices in which images are looked at, and once
                more whole (:func:`~rope_vit_det.evaluation.slicing.find_in_slices`); they overlap
                by TEST.SLICE.OVERLAP of it. Masks are then
                :class:`~rope_vit_det.data.rle_masks.RLEMasks`. None: images go whole.

        Raises:
            InputError: names the file, key or value that is wrong, and the remedy.
        """
        bound_caches()
        cfg = read_detector_config(config_or_dir, weights, opts, threshold, _SETTLED)
        self.device = find_device(device)
        cfg.MODEL.DEVICE = str(self.device)
        # The first images of every size would wait for it, longer than most inputs take.
        cfg.MODEL.ROPE_VIT.COMPILE &= "MODEL.ROPE_VIT.COMPILE" in opts
        _check(cfg, tta)
        cfg.TEST.SLICE.ENABLED = slice_side is not None
        if slice_side is not None:
            if slice_side < MIN_SLICE:
                raise InputError(f"--slice takes the side of a slice, {MIN_SLICE} pixels or more")
            cfg.TEST.SLICE.SIZE = slice_side
        cfg.freeze()
        self.cfg = cfg
        self.model, self.classes = load_detector(cfg, categories)
        self.metadata = class_metadata(self.classes["names"])
        self.threshold = threshold
        self._bf16 = bf16
        self._tta = tta
        self._detector = in_slices(
            cfg, GeneralizedRCNNWithTTA(cfg, self.model) if tta else self.model
        )
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def __call__(
        self, image: ImageLike, *, channel_order: Literal["RGB", "BGR"] = "RGB"
    ) -> Instances:
        """What the detector finds in one image; see :meth:`predict`."""
        return self.predict([image], channel_order=channel_order)[0]

    def predict(
        self,
        images: Sequence[ImageLike | Prepared],
        *,
        channel_order: Literal["RGB", "BGR"] = "RGB",
    ) -> list[Instances]:
        """What the detector finds in images.

        Images that have the same size when resized go through the network together, others one
        after the other, so that no result depends on the neighbours.

        Args:
            images: paths, files open for reading bytes and PIL images, which are turned as their
                EXIF data say, or arrays (H, W, 3) uint8, or what :meth:`prepare` made of these.
            channel_order: of arrays; OpenCV's are BGR.

        Returns:
            An Instances each, on the CPU, in the size of the image, with `pred_boxes`, `scores`,
            `pred_classes` and, of a network with masks, `pred_masks` (N, H, W) bool.

        Raises:
            InputError: an image cannot be read, has more than 8 bits a channel, or is so thin that
                nothing is left of it at the size of INPUT; or memory is short.
        """
        if channel_order not in ("RGB", "BGR"):
            raise InputError(f"channel_order must be RGB or BGR, got {channel_order!r}")

        def prepare(image: ImageLike | Prepared, number: int) -> Prepared:
            if isinstance(image, dict):
                return image
            name = _name(image, number)
            return self.prepare(_as_rgb(image, name, channel_order), name)

        are_sliced = self.cfg.TEST.SLICE.ENABLED
        with any_number_of_pixels(are_sliced), ThreadPoolExecutor(READERS) as pool:
            # One object of PIL's is not for two threads.
            several = 1 < len(images) == len({id(image) for image in images})
            inputs = list((pool.map if several else map)(prepare, images, itertools.count(1)))
        groups = defaultdict(list)
        for i, each in enumerate(inputs):
            groups[each["image"].shape].append(i)
        results: dict[int, Instances] = {}
        for group in groups.values():
            results |= zip(group, self._run([inputs[i] for i in group]), strict=True)
        return [results[i] for i in range(len(inputs))]

    def prepare(self, image: np.ndarray, name: str) -> Prepared:
        """The input of the network for an image, such as threads make ahead for :meth:`predict`.

        Args:
            image: (H, W, 3) uint8, RGB.
            name: of it, for the message.

        Raises:
            InputError: see :meth:`check_size`.
        """
        self.check_size(image.shape[:2], name)
        height, width = image.shape[:2]
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        resizes_itself = self._tta or self.cfg.TEST.SLICE.ENABLED
        if not resizes_itself:
            image = self._resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)
        # A large image is not copied.
        tensor = tensor if resizes_itself else tensor.contiguous()
        return {"image": tensor, "height": height, "width": width}

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """
        Args:
            size: (height, width) of an image.
            name: of it, for the message.

        Raises:
            InputError: it has no pixels, or none at the size that the network gets.
        """
        aug, test = self.cfg.TEST.AUG, self.cfg.INPUT
        sides, longest, keys = [test.MIN_SIZE_TEST], test.MAX_SIZE_TEST, "INPUT.MAX_SIZE_TEST"
        if self._tta:
            sides, longest, keys = aug.MIN_SIZES, aug.MAX_SIZE, "TEST.AUG.MAX_SIZE"
        height, width = size
        if not height or not width:
            raise InputError(f"{name}: {width}x{height} px: there is nothing to see in it")
        for side in filter(None, sides):  # 0: images as they are
            if not all(T.ResizeShortestEdge.get_output_shape(height, width, side, longest)):
                raise InputError(
                    f"{name}: {width}x{height} px: nothing is left of its shorter side when the "
                    f"longer one is reduced to {longest} px ({keys})"
                )

    def to_supervision(self, instances: Instances) -> "supervision.Detections":
        """A result as `supervision.Detections`, with `data["class_name"]`.

        Raises:
            InputError: the package supervision is not installed.
        """
        check_packages("supervision", extra="predict")
        import supervision

        detections = supervision.Detections.from_detectron2({"instances": instances})
        names = np.array(self.classes["names"])
        detections.data["class_name"] = names[detections.class_id]
        return detections

    def _run(self, inputs: list[Prepared]) -> list[Instances]:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)
        try:
            with torch.no_grad(), autocast:
                outputs = self._detector(inputs)
        except torch.OutOfMemoryError:
            height, width = inputs[0]["image"].shape[-2:]
            raise InputError(
                f"{self.device} has no memory for {len(inputs)} images of {width}x{height} px at a "
                "time; give a smaller batch, or INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST"
            ) from None
        found = [output["instances"].to("cpu") for output in outputs]
        return [each[each.scores >= self.threshold] for each in found]


def _name(image: ImageLike, number: int) -> str:
    """What messages call an image: its file, where it has one."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    known = getattr(image, "filename", "") or getattr(image, "name", "")
    return known if isinstance(known, str) and known else f"image {number} of those given"


def _as_rgb(image: Any, name: str, channel_order: str) -> np.ndarray:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image if channel_order == "RGB" else image[:, :, ::-1]
    if isinstance(image, str | os.PathLike | Image.Image) or hasattr(image, "read"):
        return read_rgb(image, name)
    what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
    raise InputError(
        f"{name}: an image is a path, a file open for reading bytes, a PIL image or a uint8 "
        f"array (H, W, 3), not {what}"
    )


def _check(cfg: Any, tta: bool) -> None:
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; allowed here: RGB, BGR")
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in ("SemanticSegmentor", "PanopticDeepLab"):
        raise InputError(f"MODEL.META_ARCHITECTURE {architecture} detects no instances")
    if tta and (architecture != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON):
        raise InputError(
            "Detectron2's test-time augmentation works for GeneralizedRCNN without keypoints only; "
            f"this is {architecture}{' with keypoints' if cfg.MODEL.KEYPOINT_ON else ''}"
        )

"""Running a network over image files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from ..errors import InputError
from ..models import RoPEViT
from ..utils.device import find_device
from ..utils.image_files import describe_read_error, load_batches, open_rgb
from ..weights import WeightsInfo


@dataclass(frozen=True)
class Embeddings:
    """Of N images.

    Attributes:
        paths: of the images that could be read.
        embeddings: (N, C), float32.
        unreadable: path to reason, of the images that could not.
    """

    paths: list[str]
    embeddings: np.ndarray
    unreadable: Mapping[str, str]


@dataclass(frozen=True)
class Classes:
    """The k most probable classes of N images, the most probable first.

    Attributes:
        paths: of the images that could be read.
        indices: (N, k), int64, of the logits.
        probabilities: (N, k), float32, of the softmax over all classes.
        names: of all classes, by index.
        unreadable: path to reason, of the images that could not.
    """

    paths: list[str]
    indices: np.ndarray
    probabilities: np.ndarray
    names: list[str]
    unreadable: Mapping[str, str]


def classify(
    model: RoPEViT,
    info: WeightsInfo,
    paths: Sequence[str],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Classes:
    """The most probable classes of image files.

    Args:
        model, info: of :func:`rope_vit_det.load_model`. Images are resized to the size that the
            model's position table belongs to.
        paths: see :func:`~rope_vit_det.utils.image_files.find_images`.
        top_k: how many classes; at most all.
        device: None: the GPU where there is one, else the CPU.
        progress: shows a bar on stderr, if that is a terminal.

    Raises:
        InputError: the weights have no classifier; a wrong argument; no image at all was readable.
    """
    if not model.num_classes:
        raise InputError(
            "these weights have no classifier; ask for embeddings, or name weights with classes"
        )
    if top_k < 1:
        raise InputError(f"the number of classes to give must be 1 or more, got {top_k}")
    top_k = min(top_k, model.num_classes)

    def most_probable(images: Tensor) -> tuple[Tensor, Tensor]:
        return model(images).float().softmax(dim=1).topk(top_k, dim=1)

    read, outputs, unreadable = _run(
        model, info, paths, most_probable, batch_size=batch_size, device=device, progress=progress
    )
    names = [str(index) for index in range(model.num_classes)]
    for name, index in info.class_to_idx.items():
        if 0 <= index < model.num_classes:
            names[index] = name
    probabilities, indices = (np.concatenate(arrays) for arrays in zip(*outputs, strict=True))
    return Classes(read, indices, probabilities, names, unreadable)


def embed(
    model: RoPEViT,
    info: WeightsInfo,
    paths: Sequence[str],
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Embeddings:
    """The embeddings of image files, (N, C); arguments and errors as of :func:`classify`."""

    def embedding(images: Tensor) -> tuple[Tensor]:
        return (model.embedding(images).float(),)

    read, outputs, unreadable = _run(
        model, info, paths, embedding, batch_size=batch_size, device=device, progress=progress
    )
    return Embeddings(read, np.concatenate([array for (array,) in outputs]), unreadable)


def _run(
    model: RoPEViT,
    info: WeightsInfo,
    paths: Sequence[str],
    function: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    batch_size: int,
    device: str | torch.device | None,
    progress: bool,
) -> tuple[list[str], list[tuple[np.ndarray, ...]], dict[str, str]]:
    """Paths that could be read, the function's outputs batch by batch, and paths that could not."""
    if batch_size < 1:
        raise InputError(f"the batch size must be 1 or more, got {batch_size}")
    device = find_device(device)
    model.eval().to(device)
    size = (model.pos_grid[0] * model.patch_size, model.pos_grid[1] * model.patch_size)
    transform = classification_transform(size, info.rgb_mean, info.rgb_std)
    read, outputs, unreadable = [], [], {}
    bar = tqdm(total=len(paths), unit="image", disable=None if progress else True)
    with bar, torch.inference_mode():
        for batch in load_batches(paths, batch_size, partial(_load, transform=transform)):
            images = []
            for path, image in batch:
                if isinstance(image, str):
                    unreadable[path] = image
                else:
                    read.append(path)
                    images.append(image)
            if images:
                try:
                    output = function(torch.stack(images).to(device))
                except torch.OutOfMemoryError:
                    raise InputError(
                        f"{device} has no memory for {len(images)} images of {size[0]}x{size[1]} "
                        "px at a time; give a smaller batch size"
                    ) from None
                outputs.append(tuple(tensor.cpu().numpy() for tensor in output))
            bar.update(len(batch))
    if not read:
        path, reason = next(iter(unreadable.items()), ("no image was given", ""))
        raise InputError(
            f"none of the {len(paths)} images could be read; the first, {path}: {reason}"
        )
    return read, outputs, unreadable


def _load(path: str, transform: Callable) -> Tensor | str:
    """The network's input, or the reason why there is none."""
    try:
        return transform(open_rgb(path))  # not turned, as in birder
    except Exception as error:  # PIL's plugins raise whatever a damaged file leads them to
        return describe_read_error(path, error)


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

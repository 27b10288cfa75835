"""What tools/classify.py does."""

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..models.variants import VARIANTS
from ..utils.image_files import find_images
from ..weights import load_model
from ..weights.info import architecture_from_config, parse_config
from .classify import Classes, Embeddings, classify, embed
from .output import check_output, write_classes, write_embeddings


def run(
    weights: str,
    inputs: Sequence[str],
    *,
    output: str | None = None,
    embeddings: bool = False,
    top_k: int | None = None,
    size: Sequence[int] | None = None,
    model_config: str | None = None,
    network: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> int:
    """Classes or embeddings of images, to a file or stdout.

    Args:
        weights: see :func:`rope_vit_det.load_model`.
        inputs: see :func:`~rope_vit_det.utils.image_files.find_images`.
        output: a .csv or .npz file; None: CSV to stdout.
        top_k: classes an image; None: 5.
        size: a side, or (H, W), that images are resized to; None: that of the training.
        model_config: JSON with birder's keys, over the architecture and the file's own `config`.
        network: the architecture, where the file name does not say it.

    Returns:
        The exit status: 0, or 1 where an image could not be read.

    Raises:
        InputError: nothing was done or written; says why.
    """
    if embeddings and top_k is not None:
        raise InputError("--top-k is of classes; leave it out with --embeddings")
    top_k = 5 if top_k is None else top_k
    if output is not None:
        check_output(output)
    images = find_images(inputs)
    overrides = parse_model_config(model_config, network)
    if size:
        if len(size) > 2:
            raise InputError(f"--size takes a side, or a height and a width, got {list(size)}")
        overrides["image_size"] = (size[0], size[-1])
    try:
        model, info = load_model(weights, network=network, **overrides)
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{weights}: {error}".partition("\n")[0]) from None
    results: Embeddings | Classes
    if embeddings:
        results = embed(model, info, images, batch_size=batch_size, device=device, progress=True)
        write_embeddings(results, output)
    else:
        results = classify(
            model, info, images, top_k=top_k, batch_size=batch_size, device=device, progress=True
        )
        write_classes(results, output)
    for path, reason in results.unreadable.items():
        print(f"unreadable: {path}: {reason}", file=sys.stderr)
    if results.unreadable:
        print(f"{len(results.unreadable)} of {len(images)} images unreadable", file=sys.stderr)
    return 1 if results.unreadable else 0


def parse_model_config(text: str | None, network: str | None) -> dict[str, Any]:
    """Arguments of :func:`~rope_vit_det.models.create_model` from JSON with birder's keys.

    Raises:
        InputError: it is no JSON object, or has an entry that this project cannot build.
    """
    config = parse_config(text, "--model-config")
    try:
        overrides = architecture_from_config(config, network if network in VARIANTS else None)
    except ValueError as error:
        raise InputError(f"--model-config: {error}") from None
    if "default_pt_grid_size" in overrides:
        # null takes a mapping away that the file or the architecture asks for.
        overrides["pt_grid_size"] = overrides.pop("default_pt_grid_size") or "count"
    return overrides

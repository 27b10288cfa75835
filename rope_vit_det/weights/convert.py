"""Weights from one format into another: birder's `.pt` and `.safetensors`, Detectron2's `.pth`."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..layers.patch_embed import pseudo_inverse_resize, resample_kernel
from ..models.variants import VARIANTS, is_birders
from ..utils.atomic_files import check_new_file
from .adapters import write_adapters
from .birder import SUFFIXES, misfit, network_of_file_name, write_torch_file, write_weights_file
from .detector import read_detector
from .detectron2_format import to_detectron2
from .info import WeightsInfo
from .load import PREFIXES, is_network_file, locate, read_weights
from .timm import write_timm_file

DETECTRON2_SUFFIX = ".pth"
State = dict[str, Tensor]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    network: str | None = None,
    head_from: str | None = None,
    config_file: str | os.PathLike[str] | None = None,
    patch_size: int | None = None,
    add_config: Mapping[str, Any] | None = None,
    base: str | None = None,
    force: bool = False,
) -> list[str]:
    """Writes weights into another file, whole or not at all.

    Args:
        source: a published name, a file of birder's, timm's or a publisher's, or a Detectron2
            checkpoint (`.pth`) of a backbone or a whole detector, of which the backbone is taken.
        output: `.pt` or `.safetensors` for a file of birder's, `.safetensors` for one of timm's
            where the network is, `.pth` for a backbone as Detectron2 loads it.
        network: the architecture in a file that does not say it.
        head_from: a file of birder's, or a published name, for what a detector has not: final norm,
            pooling and classifier.
        config_file: the `config.yaml` of the run that trained a detector; None: the one beside it.
        patch_size: pixels; the patch kernel is resampled to it for good, and the image size with it
            (:func:`resample_patches`).
        add_config: entries, with birder's keys, that the file shall have in its `config`.
        base: the weights that a detector with LoRA's adapters was trained from; the output (`.pth`)
            is that detector without them (:func:`~rope_vit_det.weights.adapters.write_adapters`).
        force: replace a file that is there.

    Returns:
        Lines that say what was written, and what in it is not from the source.

    Raises:
        InputError: nothing was written; says why.
    """
    output = Path(output)
    if output.suffix not in (*SUFFIXES, DETECTRON2_SUFFIX):
        raise InputError(
            f"{output}: the name of the output must end in {', '.join(SUFFIXES)} (birder's) or "
            f"{DETECTRON2_SUFFIX} (Detectron2's)"
        )
    check_new_file(output, force=force)
    if base is not None:
        if {Path(source).suffix, output.suffix} != {DETECTRON2_SUFFIX}:
            raise InputError(
                f"--base is for detectors, from {DETECTRON2_SUFFIX} to {DETECTRON2_SUFFIX}"
            )
        if network or head_from or config_file or patch_size or add_config:
            raise InputError("--base leaves the tensors as they are: no other option than --force")
        return [write_adapters(source, output, base, force=force)]
    notes: list[str] = []
    of_detectron2 = Path(source).suffix == DETECTRON2_SUFFIX and not (
        os.fspath(source).startswith(PREFIXES) or is_network_file(source)
    )
    if of_detectron2:
        state, info, notes = read_detector(
            source, network=network, head_from=head_from, config_file=config_file
        )
    elif head_from is not None or config_file is not None:
        option = "--head-from" if head_from is not None else "--config-file"
        raise InputError(f"{option} is for detectors ({DETECTRON2_SUFFIX}); {source} has a head")
    else:
        state, info = read_weights(source, network=network)
    if patch_size is not None:
        state, info = resample_patches(state, info, patch_size)
    if add_config:
        info = replace(info, config={**info.config, **add_config})
    problem = misfit(state, info)
    if problem:
        raise InputError(f"{source} cannot be converted so, to {info.network}: {problem}")
    if output.suffix == DETECTRON2_SUFFIX:
        origin = locate(source)[1] or os.path.abspath(source)
        write_torch_file(output, to_detectron2(state, info, source=origin), force=force)
        return [_summary(output, info)]
    _check_name(output, info.network)
    if is_birders(info.network):
        write_weights_file(output, state, info, force=force)
    elif output.suffix == ".safetensors":
        lost = info.config.keys() - {"attn_pool_head", "post_norm"}  # its tensors show those
        if lost:
            raise InputError(f"{output}: timm's files cannot say {', '.join(sorted(lost))}")
        write_timm_file(output, state, info, force=force)
    else:
        raise InputError(
            f"{output}: timm's networks are written as .safetensors, or for a detector"
        )
    classes = f", {info.num_classes} classes" if info.num_classes else ", no classes"
    return [_summary(output, info) + classes, *notes]


def resample_patches(
    state: Mapping[str, Tensor], info: WeightsInfo, patch_size: int
) -> tuple[State, WeightsInfo]:
    """Another patch size for good: the same tokens from images larger or smaller by that factor.

    The kernel is resampled as :class:`~rope_vit_det.layers.patch_embed.PatchEmbed` does in every
    forward pass. The position table stays as it is and belongs to an image size that grows with the
    patches. Where a network is the same but for the patch size, the info names that one; else the
    info's config says the patch size.

    Args:
        patch_size: pixels, 1 or more.

    Raises:
        InputError: for another patch size.
    """
    if patch_size < 1:
        raise InputError(f"the patch size must be 1 pixel or more, got {patch_size}")
    old = info.architecture["patch_size"]
    if patch_size == old:
        return dict(state), info
    kernel = state["conv_proj.weight"]
    resampled = resample_kernel(kernel.float(), pseudo_inverse_resize(old, patch_size))
    height, width = (side // old * patch_size for side in info.image_size)
    info = replace(info, image_size=(height, width))
    wanted = VARIANTS[info.network] | {"patch_size": patch_size}
    siblings = [name for name, variant in VARIANTS.items() if variant == wanted]
    if siblings and "patch_size" not in info.config:
        info = replace(info, network=siblings[0])
    else:
        info = replace(info, config={**info.config, "patch_size": patch_size})
    return dict(state) | {"conv_proj.weight": resampled.to(kernel.dtype)}, info


def _check_name(output: Path, network: str) -> None:
    """A file that claims another network than it holds could not be read again."""
    claimed = network_of_file_name(output.name)[0]
    if claimed is not None and claimed != network:
        raise InputError(
            f"{output}: this name says {claimed}, and the network is {network}; let the name begin "
            f"with {network}"
        )


def _summary(output: Path, info: WeightsInfo) -> str:
    height, width = info.image_size
    config = f", config {dict(info.config)}" if info.config else ""
    return f"wrote {output}: {info.network}, {height}x{width} px{config}"

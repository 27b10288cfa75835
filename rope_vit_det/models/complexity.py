"""How much a network computes, and how many parameters it has, without computing anything."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers.patch_embed import PatchEmbed, resample_kernel
from .variants import check_network, create_model

_aten = torch.ops.aten
# By name, the first that matches; the last matches everything.
_PARTS = {
    "stem": r"conv_proj",
    "attention": r"encoder\.block\.\d+\.attn",
    "feed-forward layers": r"encoder\.block\.\d+\.mlp",
    "tokens, positions, norms": r"",
}


class Complexity(NamedTuple):
    """Of a module, or of a part of it."""

    parameters: int
    multiply_adds: int  # products of matrices and convolutions, those within attention included
    activations: int  # elements that convolutions and linear layers put out


def network_complexity(name: str, height: int, width: int, **kwargs: Any) -> dict[str, Complexity]:
    """What the parts of a network cost for one image, without anything behind the last block.

    Args:
        name, kwargs: of :func:`create_model`.
        height, width: of the image in pixels, multiples of the patch stride.
    """
    with torch.device("meta"):
        model = create_model(name, **kwargs, features_only=True).eval()
        image = torch.empty(1, 3, height, width)
    model.forward = model.detection_features  # type: ignore[assignment, method-assign]
    return count_complexity(model, image, network_part)


def network_tables(
    name: str, size: tuple[int, int], patch_stride: int, window_sizes: Sequence[int]
) -> str:
    """What a network costs for one image, as a table for each window size (0: global attention).

    Args:
        name: a key of :data:`~rope_vit_det.models.VARIANTS`.
        size: (h, w) of the image in pixels, padded to multiples of the patch stride.

    Raises:
        InputError: for an unknown network.
    """
    check_network(name, "--network: ")
    size = padded_size(size, patch_stride)
    tables = []
    for window in window_sizes:
        parts = network_complexity(name, *size, patch_stride=patch_stride, window_size=window)
        attention = f"windows of {window}x{window} tokens" if window else "global attention"
        title = f"{name}, {describe_size(size)}, patch stride {patch_stride}, {attention}"
        tables.append(f"{title}\n\n{complexity_table(parts)}")
    return "\n\n".join(tables)


def total(parts: Mapping[str, Complexity]) -> Complexity:
    """Of all parts together."""
    return Complexity(*map(sum, zip(*parts.values(), strict=True)))


def complexity_table(parts: Mapping[str, Complexity]) -> str:
    """The parts and their sum as a table: millions, billions (of operations: x2), millions."""
    rows = [
        (
            name,
            f"{part.parameters / 1e6:.2f}",
            f"{part.multiply_adds / 1e9:.2f}",
            f"{2 * part.multiply_adds / 1e9:.2f}",
            f"{part.activations / 1e6:.1f}",
        )
        for name, part in (*parts.items(), ("total", total(parts)))
        if any(part)
    ]
    headers = ("", "parameters (M)", "multiply-adds (G)", "operations (G)", "activations (M)")
    return tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 4)
    )


def padded_size(size: tuple[int, int], step: int) -> tuple[int, int]:
    """(h, w), each side rounded up to a multiple of `step`."""
    return (-(-size[0] // step) * step, -(-size[1] // step) * step)


def describe_size(size: tuple[int, int]) -> str:
    """The heading's words for an image of (h, w) px."""
    return f"an image of {size[0]}x{size[1]} px"


def network_part(path: str) -> str:
    """The part of a :class:`RoPEViT` that a module or parameter of that name belongs to."""
    return next(part for part, pattern in _PARTS.items() if re.match(pattern, path))


def count_complexity(
    model: nn.Module, inputs: Any, part_of: Callable[[str], str]
) -> dict[str, Complexity]:
    """What every part of a model costs, in one forward pass.

    Norms, activation functions, rotation and interpolation, which are linear in the tokens and
    small, do not count. On the meta device nothing is computed.

    Args:
        model: in evaluation mode; its patch kernels are resampled for good, which is work of once
            and not of every image.
        inputs: its argument.
        part_of: the part that a module or a parameter belongs to, by its name in the model
            ("": the model itself).

    Returns:
        The parts in the order of their parameters.
    """
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()

    _fix_kernels(model)

    def elements(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        return math.prod(out_shape)

    stored = dict.fromkeys((_aten.convolution, _aten.addmm, _aten.mm), elements)
    # Attention, which does not store its scores.
    stored |= dict.fromkeys((_aten.bmm, _aten.baddbmm), lambda *args, **kwargs: 0)
    flops = FlopCounterMode(display=False)
    stores = FlopCounterMode(display=False, custom_mapping=stored)
    with torch.inference_mode(), stores, flops:
        model(inputs)
    operations, activations = _by_part(flops, part_of), _by_part(stores, part_of)
    return {
        # A multiply-add is two operations.
        part: Complexity(parameters[part], operations[part] // 2, activations[part])
        for part in dict.fromkeys((*parameters, *operations))
    }


def _by_part(counter: FlopCounterMode, part_of: Callable[[str], str]) -> Counter[str]:
    """The counts of all modules, each without those of the modules in it, by part."""
    # The names begin with the class of the model.
    counts = {
        name.partition(".")[2]: sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
        if name != "Global"
    }
    parts: Counter[str] = Counter()
    for path, count in counts.items():
        parts[part_of(path)] += count
        while path:  # up to the module that called it
            path = path.rpartition(".")[0]
            if path in counts:
                parts[part_of(path)] -= count
                break
    return parts


def _fix_kernels(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PatchEmbed) and module.resize_matrix is not None:
            with torch.no_grad():
                kernel = resample_kernel(module.weight, module.resize_matrix)
            module.weight, module.resize_matrix = nn.Parameter(kernel), None

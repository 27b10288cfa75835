"""The table of the published weights in docs/networks.md, made from the networks themselves."""

import os
import re
from pathlib import Path

from tabulate import tabulate

from ..models.complexity import count_multiply_adds, count_parameters
from .catalogue import PublishedWeights, published_weights

SIDE = 1024  # pixels
STRIDE = 16
WINDOW = 16  # tokens

_BEGIN, _END = "<!-- table: tools/networks_table.py -->", "<!-- end of table -->"
_HEADERS = ("`birder://` name", "px", "M", "global", "windowed", "pretraining")


def networks_table() -> str:
    """A Markdown table with a row for each of the published weights."""
    rows = [
        (
            f"`{entry.name}`",
            entry.image_size[0],
            f"{_parameters(entry) / 1e6:.1f}",
            f"{_multiply_adds(entry, window_size=0) / 1e9:.0f}",
            f"{_multiply_adds(entry, window_size=WINDOW) / 1e9:.0f}",
            _pretraining(entry),
        )
        for entry in published_weights().values()
    ]
    return tabulate(
        rows,
        headers=_HEADERS,
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "right", "left"),
    )


def _parameters(entry: PublishedWeights) -> int:
    return count_parameters(entry.network, image_size=entry.image_size, features_only=True)


def _multiply_adds(entry: PublishedWeights, *, window_size: int) -> int:
    return count_multiply_adds(
        entry.network,
        SIDE,
        SIDE,
        image_size=entry.image_size,
        patch_stride=STRIDE,
        window_size=window_size,
    )


def _pretraining(entry: PublishedWeights) -> str:
    """What the catalogue's sentence says of the training, without the network's name before it."""
    sentence = entry.description.partition(". It has not been")[0]
    found = re.search(r"\b(pretrain|trained|then|CAPI pretraining)", sentence)
    assert found, entry
    return sentence[found.start() :]


def update_table(path: str | os.PathLike[str]) -> None:
    """Puts the table between the two marks of a Markdown file."""
    text = Path(path).read_text("utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    Path(path).write_text(f"{before}{_BEGIN}\n\n{networks_table()}\n\n{_END}{after}", "utf-8")

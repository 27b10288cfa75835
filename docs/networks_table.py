#!/usr/bin/env python3
"""Brings the tables in docs/networks.md up to date with the catalogue and the networks."""

import re
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from rope_vit_det.models.complexity import Complexity, network_complexity, total
from rope_vit_det.models.variants import is_birders
from rope_vit_det.weights.catalogue import PublishedWeights, published_weights

FILE = Path(__file__).with_name("networks.md")

SIDE = 1024  # pixels
STRIDE = 16
WINDOW = 16  # tokens

_END = "<!-- end of table -->"
_HEADERS = ("name", "px", "M", "global", "windowed")


def birders_table() -> str:
    """A Markdown table with a row for each of birder's published weights."""
    entries = [entry for entry in published_weights().values() if is_birders(entry.network)]
    return _table(entries, "pretraining", [_pretraining(entry) for entry in entries])


def timms_table() -> str:
    """The same of timm's, with their licences, which the hub states."""
    entries = [entry for entry in published_weights().values() if not is_birders(entry.network)]
    return _table(entries, "licence", [entry.license or "" for entry in entries])


def _table(entries: Sequence[PublishedWeights], last: str, words: Sequence[str]) -> str:
    rows = []
    counts: dict[tuple[object, ...], tuple[str, str, str]] = {}
    for entry, word in zip(entries, words, strict=True):
        key = (entry.network, entry.image_size)
        if key not in counts:
            everywhere, windowed = _complexity(entry, 0), _complexity(entry, WINDOW)
            counts[key] = (
                f"{everywhere.parameters / 1e6:.1f}",
                f"{everywhere.multiply_adds / 1e9:.0f}",
                f"{windowed.multiply_adds / 1e9:.0f}",
            )
        rows.append((f"`{entry.name}`", entry.image_size[0], *counts[key], word))
    alignment = ("left", "right", "right", "right", "right", "left")
    headers = (*_HEADERS, last)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def _complexity(entry: PublishedWeights, window_size: int) -> Complexity:
    """Of the whole network."""
    sizes = {"image_size": entry.image_size, "patch_stride": STRIDE, "window_size": window_size}
    return total(network_complexity(entry.network, SIDE, SIDE, **sizes))


def _pretraining(entry: PublishedWeights) -> str:
    """What the catalogue's sentence says of the training, without the network's name before it."""
    sentence = entry.description.partition(". It has not been")[0]
    found = re.search(r"\b(pretrain|trained|then|CAPI pretraining)", sentence)
    assert found, entry
    return sentence[found.start() :]


def update(publisher: str, table: str) -> None:
    """Puts a table between its two marks in the page."""
    before, mark, rest = FILE.read_text("utf-8").partition(f"<!-- table: {publisher} -->")
    _, _, after = rest.partition(_END)
    FILE.write_text(f"{before}{mark}\n\n{table}\n\n{_END}{after}", "utf-8")


if __name__ == "__main__":
    update("birder", birders_table())
    update("timm", timms_table())

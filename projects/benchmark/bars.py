"""What the backbone is meant to reach, as ratios of medians of one run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GRID = (64, 64)


@dataclass(frozen=True)
class Bar:
    """A ratio of two measurements: how many times as long the first takes as the second."""

    slower: tuple[str, str]  # network, precision
    faster: tuple[str, str]
    least: float | None = None
    most: float | None = None
    slower_grid: tuple[int, int] = GRID
    faster_grid: tuple[int, int] = GRID


# On two CPU cores, one image.
BARS = (
    Bar(("birder", "fp32"), ("global", "fp32"), least=1.0),
    Bar(("birder", "fp32"), ("windowed", "fp32"), least=1.5),
    Bar(("vitdet", "fp32"), ("windowed", "fp32"), least=3.0),
    Bar(("birder", "fp32"), ("windowed", "bf16"), least=4.0),
    Bar(("birder", "bf16"), ("windowed", "bf16"), least=2.4),
    Bar(("windowed", "fp32"), ("windowed", "fp32"), most=7.2, slower_grid=(128, 128)),
    Bar(("windows-only", "fp32"), ("windows-only", "fp32"), most=4.6, slower_grid=(128, 128)),
    # an image of 800x1216 px, as it is and padded to a square
    Bar(
        ("windowed", "fp32"),
        ("windowed", "fp32"),
        least=1.4,
        slower_grid=(76, 76),
        faster_grid=(50, 76),
    ),
)


def check_bars(measurements: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars that a run has both sides of, in each of its modes.

    Returns:
        One dict a bar and mode: "what", "wanted", "ratio", "met".
    """
    medians = {
        (m["mode"], m["network"], m["precision"], tuple(m["grid"])): m["median_s"]
        for m in measurements
        if not m["compiled"]
    }
    found = []
    for mode in dict.fromkeys(key[0] for key in medians):
        for bar in BARS:
            slower = medians.get((mode, *bar.slower, bar.slower_grid))
            faster = medians.get((mode, *bar.faster, bar.faster_grid))
            if slower is None or faster is None:
                continue
            ratio = slower / faster
            met = ratio >= bar.least if bar.least is not None else ratio <= bar.most
            found.append(
                {
                    "what": f"{mode}: {_side(bar.slower, bar.slower_grid)} / "
                    f"{_side(bar.faster, bar.faster_grid)}",
                    "wanted": f"≥ {bar.least}" if bar.least is not None else f"≤ {bar.most}",
                    "ratio": ratio,
                    "met": met,
                }
            )
    return found


def _side(network: tuple[str, str], grid: tuple[int, int]) -> str:
    return f"{network[0]} {network[1]} {grid[0]}×{grid[1]}"

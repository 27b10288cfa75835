"""What backbone and detector are meant to reach: ratios of medians of one run, and times."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Side = Mapping[str, Any]  # what a measurement says of itself


@dataclass(frozen=True)
class Bar:
    """A measurement, or how many times as much as another it is.

    Attributes:
        machine: "cpu", "cpu with AMX", "cpu without AMX", "cuda", or a part of a GPU's name: times
            without a ratio count on one card alone.
        measured: of which thing.
        over: of which other.
        quantity: the measurement's key.
    """

    machine: str
    what: str
    measured: Side
    over: Side | None = None
    least: float | None = None
    most: float | None = None
    quantity: str = "median_s"

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


def _net(network: str, precision: str, grid: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    return {
        "network": network, "precision": precision, "grid": list(grid), "compiled": False
    }  # fmt: skip


def _cpu(
    slower: Side, faster: Side, least: float | None = None, most: float | None = None, machine="cpu"
) -> list[Bar]:
    def say(side: Side) -> str:
        return f"{side['network']} {side['precision']} {'×'.join(map(str, side['grid']))}"

    return [
        Bar(
            machine,
            f"{mode}: {say(slower)} / {say(faster)}",
            {"mode": mode, **slower},
            {"mode": mode, **faster},
            least,
            most,
        )
        for mode in ("forward", "training")
    ]


def _gpu_net(network: str, compiled: bool) -> dict[str, Any]:
    return {**_net(network, "bf16"), "mode": "training", "batch_size": 8, "compiled": compiled}


def _detector(mode: str, network: str, size: list[int], batch_size: int) -> dict[str, Any]:
    heads = "recipe" if network in ("windowed", "global") else "Detectron2"
    return {
        "mode": mode, "network": network, "heads": heads, "size": size, "batch_size": batch_size
    }  # fmt: skip


_SQUARE, _WIDE = [1024, 1024], [800, 1216]
_STEP = _detector("step", "windowed", _SQUARE, 8)
_WINDOWED_NET = _gpu_net("windowed", True)

BARS = (
    # On two CPU cores, one image.
    *_cpu(_net("birder", "fp32"), _net("global", "fp32"), least=1.0),
    *_cpu(_net("birder", "fp32"), _net("windowed", "fp32"), least=1.5),
    *_cpu(_net("vitdet", "fp32"), _net("windowed", "fp32"), least=3.0),
    *_cpu(_net("birder", "fp32"), _net("windowed", "bf16"), least=4.0),
    *_cpu(_net("birder", "bf16"), _net("windowed", "bf16"), 2.4, machine="cpu without AMX"),
    *_cpu(_net("birder", "bf16"), _net("windowed", "bf16"), 1.8, machine="cpu with AMX"),
    *_cpu(_net("windowed", "fp32", (128, 128)), _net("windowed", "fp32"), most=7.2),
    *_cpu(_net("windows-only", "fp32", (128, 128)), _net("windows-only", "fp32"), most=4.6),
    # an image of 800x1216 px, as it is and padded to a square
    *_cpu(_net("windowed", "fp32", (76, 76)), _net("windowed", "fp32", (50, 76)), least=1.4),
    # On a GPU, in bf16. The network as the recipe runs it, its peers eager.
    Bar("cuda", "network's forward and backward pass, batch 8: birder / ours",
        _gpu_net("birder", False), _WINDOWED_NET, least=2.0),
    Bar("cuda", "network's forward and backward pass, batch 8: ViTDet-B / ours",
        _gpu_net("vitdet", False), _WINDOWED_NET, least=5.0),
    Bar("cuda", "the same, of its linear layers' rate",
        _WINDOWED_NET, least=0.5, quantity="share_of_matrix_rate"),
    # The peers under Detectron2's heads and step.
    Bar("cuda", "step of batch 8, 1024²: ours / ViTDet-B",
        _STEP, _detector("step", "vitdet", _SQUARE, 8), most=0.40),
    Bar("cuda", "step of batch 8, 1024²: ours / birder's neck",
        _STEP, _detector("step", "birder", _SQUARE, 8), most=0.65),
    *(
        Bar("cuda", f"one image of {size[0]}×{size[1]}: ViTDet-B / ours",
            _detector("predict", "vitdet", size, 1), _detector("predict", "windowed", size, 1),
            least=3.0)
        for size in (_SQUARE, _WIDE)
    ),
    *(
        Bar("cuda", f"one image of {size[0]}×{size[1]}: windowed / global",
            _detector("predict", "windowed", size, 1), _detector("predict", "global", size, 1),
            most=1.0)
        for size in (_SQUARE, _WIDE)
    ),
    Bar("cuda", "COMPILE, cold: seconds", {"mode": "compile", "of": "all"}, most=30.0),
    Bar("H200", "step of batch 8, 1024²: seconds (moonshot)", _STEP, most=0.200),
    Bar("H200", "step of batch 2, 1024²: seconds", _STEP | {"batch_size": 2}, most=0.090),
    Bar("H200", "the one-GPU recipe, loader and all: images/s",
        {"mode": "train_net", "of": "one GPU"}, least=25.0, quantity="images_per_s"),
    Bar("H200", "an iteration of the demo: seconds",
        {"mode": "train_net", "of": "demo"}, most=0.045),
    *(
        Bar("H200", f"one image of {size[0]}×{size[1]}: seconds",
            _detector("predict", "windowed", size, 1), most=most)
        for size, most in ((_SQUARE, 0.014), (_WIDE, 0.013))
    ),
    Bar("H200", "predict.py, 800×1216 JPEGs to COCO's JSON, batch 8: images/s",
        {"mode": "predict_files"}, least=60.0, quantity="images_per_s"),
)  # fmt: skip


def check_bars(
    measurements: Iterable[Mapping[str, Any]], machine: str, *, all_of_them: bool = False
) -> list[dict[str, Any]]:
    """The bars that a run has what is needed for.

    Args:
        machine: "cuda" and the GPU's name, or "cpu with AMX" or "cpu without AMX".
        all_of_them: those of this kind of machine that were not measured, too.

    Returns:
        One dict a bar: "what", "wanted", "value", "met"; the last two None where not measured.
    """
    measurements = list(measurements)

    def find(side: Side, quantity: str) -> float | None:
        for each in measurements:
            if all(each.get(key) == value for key, value in side.items()):
                return each.get(quantity)
        return None

    found = []
    for bar in BARS:
        if bar.machine not in machine and not (all_of_them and is_for_gpus(bar, machine)):
            continue
        value = find(bar.measured, bar.quantity) if bar.machine in machine else None
        if value is not None and bar.over is not None:
            other = find(bar.over, bar.quantity)
            value = None if other is None else value / other
        if value is None and not all_of_them:
            continue
        met = value and (value >= bar.least if bar.least is not None else value <= bar.most)
        found.append({"what": bar.what, "wanted": bar.wanted, "value": value, "met": met})
    return found


def is_for_gpus(bar: Bar, machine: str) -> bool:
    """Whether both are about GPUs: on another card, a bar in milliseconds is not measured."""
    return machine.startswith("cuda") and not bar.machine.startswith("cpu")

"""What the switches for high resolution do to a detector beyond its training resolution.

A small detector is trained on squares of one size. Then each combination of attention, rotary
positions and absolute position table meets larger images, as it is and after a short fine-tuning.
"""

import json
import logging
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from detectron2.config import CfgNode

from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.data.demo.dataset import demo_dataset_root, generate_demo_dataset
from rope_vit_det.engine.main import train
from rope_vit_det.engine.setup import check_config, load_config
from rope_vit_det.engine.trainer import Trainer
from rope_vit_det.errors import InputError

SCALES = (1.0, 1.5, 2.0, 3.0)
_TEST_SET = "rope_vit_det_demo_val"
_BASE = "model_final.pth"
_SIDE_MULTIPLE = 32  # of the pyramid
# Of SOLVER.BASE_LR: fine-tuning starts from weights that are worth keeping.
_FINE_TUNING_RATE = 0.4


@dataclass(frozen=True)
class Arm:
    """One cell of the study.

    Attributes:
        scale: of the images, relative to those of the training.
        attention: over the whole grid, or in windows of the training's grid, with GLOBAL_BLOCKS.
        positions: rotary positions that count on, or are mapped onto the training's grid.
        table: the absolute position table, stretched over the image, or repeated (in each window).
        fine_tuned: whether the detector learns a little more at this scale, in this setting.
    """

    scale: float
    attention: Literal["global", "windowed"] = "global"
    positions: Literal["counting", "mapped"] = "counting"
    table: Literal["interpolated", "tiled"] = "interpolated"
    fine_tuned: bool = False

    def same_at_training_size(self) -> "Arm":
        """At scale 1 the settings are the same network: one of them stands for all."""
        return Arm(1.0, fine_tuned=self.fine_tuned) if self.scale == 1 else self

    @property
    def name(self) -> str:
        training = "fine-tuned" if self.fine_tuned else "frozen"
        return f"{self.scale:g}x_{self.attention}_{self.positions}_{self.table}_{training}"


@dataclass(frozen=True)
class StudyOptions:
    """How much to measure.

    Attributes:
        seeds: trainings to average over.
        fine_tuning_iterations: of each arm that is fine-tuned.
        scales: of `SCALES`, or others that make the side a multiple of 32 px.
    """

    output: Path
    seeds: int = 1
    fine_tuning_iterations: int = 60
    scales: Sequence[float] = SCALES


def all_arms(scales: Sequence[float]) -> Iterator[Arm]:
    """All combinations, those of scale 1 eight times each."""
    for fine_tuned, scale, *setting in product(
        (False, True),
        scales,
        ("global", "windowed"),
        ("counting", "mapped"),
        ("interpolated", "tiled"),
    ):
        yield Arm(scale, *setting, fine_tuned)


def run_study(
    config_file: str,
    options: StudyOptions,
    opts: Sequence[str] = (),
    tell: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Trains and evaluates whatever the output folder does not hold yet.

    Args:
        config_file: of the detector; INPUT.LSJ.IMAGE_SIZE is the training resolution.
        opts: KEY VALUE pairs over the config.
        tell: is given a line for each thing that is done.

    Returns:
        A dict a combination: the fields of :class:`Arm`, and "AP", "AP50": a value a seed.

    Raises:
        InputError: a wrong config, or an output folder with results of another one.
    """
    cfg = load_config(Namespace(config_file=config_file, opts=[*opts, "DATASETS.TEST", "()"]))
    _check(options, cfg)
    generate_demo_dataset(demo_dataset_root())
    check_config(cfg)
    _claim(options, cfg)
    # Detectron2's own progress would hide ours.
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    arms = list(all_arms(options.scales))
    measured = list(dict.fromkeys(arm.same_at_training_size() for arm in arms))
    found: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in measured}
    for seed in range(options.seeds):
        folder = options.output / f"seed{seed}"
        with _told(f"seed {seed}, training", tell):
            _train_base(_with(cfg, {"SEED": cfg.SEED + seed}), folder)
        for number, arm in enumerate(measured, 1):
            with _told(f"seed {seed}, {number} of {len(measured)}, {arm.name}", tell):
                found[arm].append(_result(cfg, arm, folder, options.fine_tuning_iterations))
    return [
        asdict(arm)
        | {
            key: [result[key] for result in found[arm.same_at_training_size()]]
            for key in ("AP", "AP50")
        }
        for arm in arms
    ]


def arm_config(cfg: CfgNode, arm: Arm) -> CfgNode:
    """The config of the training, changed to what an arm stands for."""
    base, stride = cfg.INPUT.LSJ.IMAGE_SIZE, cfg.MODEL.ROPE_VIT.PATCH_STRIDE
    grid, side = base // stride, round(base * arm.scale)
    return _with(
        cfg,
        {
            "MODEL.ROPE_VIT.WINDOW_SIZE": grid if arm.attention == "windowed" else 0,
            "MODEL.ROPE_VIT.PT_GRID_SIZE": [grid, grid] if arm.positions == "mapped" else "count",
            "MODEL.ROPE_VIT.TILE_POS_EMBED": arm.table == "tiled",
            "INPUT.LSJ.IMAGE_SIZE": side,
            # The longer side of a test image is then just that long.
            "INPUT.MIN_SIZE_TEST": side,
            "INPUT.MAX_SIZE_TEST": side,
        },
    )


def _result(cfg: CfgNode, arm: Arm, folder: Path, iterations: int) -> dict[str, float]:
    """Box AP of an arm: from the file that an earlier run left, or measured."""
    file = folder / f"{arm.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    cfg = _with(arm_config(cfg, arm), {"MODEL.WEIGHTS": str(folder / _BASE)})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        cfg = _with(cfg, {"OUTPUT_DIR": scratch})
        if arm.fine_tuned:
            rate = _FINE_TUNING_RATE * cfg.SOLVER.BASE_LR
            solver = {"MAX_ITER": iterations, "WARMUP_ITERS": iterations // 10, "BASE_LR": rate}
            cfg = _with(cfg, {f"SOLVER.{key}": value for key, value in solver.items()})
            train(cfg)
            cfg = _with(cfg, {"MODEL.WEIGHTS": str(Path(scratch, _BASE))})
        result = _evaluate(_with(cfg, {"DATASETS.TEST": (_TEST_SET,)}))
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(result))
    draft.rename(file)
    return result


def _train_base(cfg: CfgNode, folder: Path) -> None:
    """Trains at scale 1, or goes on with a training that was cut off."""
    if not (folder / _BASE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        cfg = _with(arm_config(cfg, Arm(1.0)), {"OUTPUT_DIR": str(folder)})
        train(cfg, resume=True)


def _evaluate(cfg: CfgNode) -> dict[str, float]:
    model = Trainer.build_model(cfg)
    # Images become squares, as in the training, so that the grid is the training's, times the
    # scale, along both axes.
    model.backbone._size_divisibility = cfg.INPUT.MAX_SIZE_TEST
    DetectorCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    results = Trainer.test(cfg, model)["bbox"]
    return {key: results[key] for key in ("AP", "AP50")}


def _check(options: StudyOptions, cfg: CfgNode) -> None:
    for key in ("seeds", "fine_tuning_iterations"):
        if getattr(options, key) < 1:
            raise InputError(f"{key}: {getattr(options, key)}; at least 1 is needed")
    for scale in options.scales:
        side = cfg.INPUT.LSJ.IMAGE_SIZE * scale
        if side <= 0 or side % _SIDE_MULTIPLE:
            raise InputError(
                f"scales: {scale:g} makes images of {side:g} px; the side must be a multiple of "
                f"{_SIDE_MULTIPLE} px"
            )


def _claim(options: StudyOptions, cfg: CfgNode) -> None:
    """Marks the output folder as this study's, or refuses one that is another's."""
    mine = f"# fine-tuning iterations: {options.fine_tuning_iterations}\n{cfg.dump()}"
    file = options.output / "config.yaml"
    if not file.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(mine)
    elif file.read_text() != mine:
        raise InputError(
            f"{options.output} holds results of other settings (see its config.yaml); "
            "delete it or name another folder"
        )


def _with(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """A copy of a config with other values, by key."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    cfg.freeze()
    return cfg


@contextmanager
def _told(what: str, tell: Callable[[str], object]) -> Iterator[None]:
    start = time.monotonic()
    yield
    tell(f"{what}: {time.monotonic() - start:.0f} s")

"""Runs a case through tools/train_net.py, in this process or in a fresh one."""

import contextlib
import copy
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.logger import setup_logger

from .case import COUNTS, FUNCTION, HANDLED, OWN, REFUSED, REGISTERED, Case, World, good_world
from .configs import TRACE

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_net.py"
LIMIT = 300  # seconds on a busy machine; what takes that long hangs
REFUSAL = 2  # exit status
# One step over all four images, then the evaluation.
SMALL = (
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "4", "TEST.EVAL_PERIOD", "0"),
    *("DATALOADER.ASPECT_RATIO_GROUPING", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "128"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "128"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "OUTPUT_DIR", "out"),
)


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        kind: HANDLED, REFUSED, or what else it was.
        line: the error's.
        log: all that was printed.
    """

    kind: str
    line: str
    log: str


def run_case(case: Case, way: str, folder: Path, *, fresh: bool = False) -> Outcome:
    """Spoils a good run and starts it.

    Args:
        folder: for its files; empty or not there.
        fresh: in a new process; needs `way` OWN.
    """
    world = good_world(folder)
    case.spoil(world)
    world.write_json()
    arguments = _arguments(world, way)
    if fresh:
        status, out, err = _in_fresh_process(arguments, folder)
    else:
        with _registered(world, way), _inside(folder):
            status, out, err = _in_this_process(arguments)
    if (folder / TRACE).exists():
        return Outcome("ran code", "", out + err)
    return _outcome(status, out, err)


def _arguments(world: World, way: str) -> list[str]:
    arguments = ["--config-file", str(ROOT / "configs" / "demo.yaml")]
    for name in world.configs:
        arguments += ["--config-file", name]
    opts = [*SMALL]
    if way == OWN:
        for split in COUNTS:
            arguments += [f"--{split}-json", f"{split}.json", f"--{split}-images", split]
    else:
        names = {"TRAIN": world.train, "TEST": world.test}
        for key, split in (("TRAIN", "train"), ("TEST", "val")):
            name = f"corpus_{split}" if names[key] is None else names[key]
            opts += [f"DATASETS.{key}", f"('{name}',)" if name else "()"]
        opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    return [*arguments, *world.flags, *opts, *world.opts]


def _outcome(status: int, out: str, err: str) -> Outcome:
    log = out + err
    lines = err.strip().splitlines()
    if status == 0:
        return Outcome(HANDLED, "", log)
    if "Traceback" in log:
        return Outcome("traceback", "", log)
    if status != REFUSAL or not lines or not lines[-1].startswith("error: "):
        return Outcome(f"status {status}", "", log)
    if sum(line.startswith("error: ") for line in lines) > 1:
        return Outcome("several errors", "", log)
    return Outcome(REFUSED, lines[-1], log)


def _in_fresh_process(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=LIMIT,
    )
    return answer.returncode, answer.stdout, answer.stderr


def _in_this_process(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status: int | str | None = 0
    argv, sys.argv = sys.argv, [str(TOOL), *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _time_limit():
            runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        status = 1
        err.write(f"Traceback of {type(error).__name__}: {error}")
    finally:
        sys.argv = argv
        _close_logs()
    return (status if isinstance(status, int) else int(status is not None)), *(
        stream.getvalue() for stream in (out, err)
    )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _registered(world: World, way: str) -> Iterator[None]:
    for split in COUNTS:
        path, images = world.folder / f"{split}.json", world.folder / split
        if way != FUNCTION:
            register_coco_instances(f"corpus_{split}", {}, str(path), str(images))
            continue
        DatasetCatalog.register(f"corpus_{split}", partial(copy.deepcopy, world.dicts[split]))
        metadata = MetadataCatalog.get(f"corpus_{split}").set(evaluator_type="coco")
        if world.classes[split] is not None:
            metadata.thing_classes = world.classes[split]
    DatasetCatalog.register("corpus_without_evaluator", partial(DatasetCatalog.get, "corpus_val"))
    MetadataCatalog.get("corpus_without_evaluator").set(thing_classes=["cat", "dog"])
    try:
        yield
    finally:
        for name in ("corpus_train", "corpus_val", "corpus_without_evaluator"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _close_logs() -> None:
    """Detectron2's loggers keep the files and streams of every run, and are set up only once."""
    if hasattr(setup_logger, "cache_clear"):
        setup_logger.cache_clear()
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        if name.split(".")[0] in ("detectron2", "fvcore", "rope_vit_det"):
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()


__all__ = ["FUNCTION", "HANDLED", "OWN", "REFUSED", "REGISTERED", "Outcome", "run_case"]

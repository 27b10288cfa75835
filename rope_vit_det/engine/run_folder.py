"""The folder of a run: not written over unasked, and what lies in it at the end."""

import argparse
import contextlib
import json
import logging
import secrets
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpoint_files import last_checkpoint
from ..config.run_config import PACKAGE
from ..data.validation.check import FAULTS_FILE
from ..distributed.launch import is_first_process
from ..errors import InputError
from ..utils.atomic_files import check_folder, new_file

logger = logging.getLogger(__name__)

RECORD_FILE = "runs.json"
SEED_FILE = "seed.txt"
TRACEBACK_FILE = "rehearsal_traceback.txt"
_NO_RUN = {FAULTS_FILE, TRACEBACK_FILE}  # what checks write
_CONTENTS = (
    ("report.html", "the run on one page, for a browser"),
    ("model_final.pth", "the trained detector"),
    ("model_best.pth", "the best checkpoint by SOLVER.BEST_METRIC"),
    ("inference", "predictions on the held-out images, and AP"),
    ("inference_TTA", "the same under test-time augmentation"),
    ("metrics.json", "every logged number; TensorBoard: tensorboard --logdir {output}"),
    ("config.yaml", "the full config"),
    (RECORD_FILE, "a line a start: command, seed, git revision, versions, full config"),
    ("log.txt", "what was printed"),
    (FAULTS_FILE, "what is wrong with the datasets"),
    ("curves.png", "losses and AP over the iterations"),
    ("predictions.png", "held-out images: ground truth beside predictions"),
)


def check_writable(output: str, *, key: str = "OUTPUT_DIR") -> None:
    """Makes the folder of a run, where it is not there.

    Args:
        key: that names it, for the message.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if "://" not in output:
            check_folder(output)
        PathManager.mkdirs(output)
    except (InputError, OSError) as error:
        raise InputError(f"{key}: {error}; name another folder") from None


def check_output(output: str, args: argparse.Namespace) -> None:
    """Checks that a training begins in a folder without another one's checkpoints.

    Args:
        output: OUTPUT_DIR, or train.output_dir.
        args: of :func:`~rope_vit_det.engine.command_line.argument_parser`.

    Raises:
        InputError: it has some, and neither --resume nor --overwrite is given; or --overwrite
            cannot be.
    """
    if getattr(args, "overwrite", False):
        if args.resume or args.eval_only:
            other = "--resume" if args.resume else "--eval-only"
            raise InputError(f"--overwrite begins a new training; leave it out beside {other}")
        if Path.cwd().is_relative_to(Path(output).resolve()):
            raise InputError(
                f"--overwrite would move the current folder aside; {output!r} is no OUTPUT_DIR for "
                "it: name a folder below"
            )
    elif not (args.resume or args.eval_only) and last_checkpoint(output):
        raise InputError(
            f"{output} holds the checkpoints of an earlier training; add --resume to go on with "
            "it, set another OUTPUT_DIR (train.output_dir), or add --overwrite, which moves it "
            "aside"
        )


def clear_output(output: str, args: argparse.Namespace) -> None:
    """Moves an earlier run aside where --overwrite says so; to be called before :func:`launch`.

    Args:
        output, args: as of :func:`check_output`.
    """
    if getattr(args, "overwrite", False) and is_first_process(args):
        move_aside(output)


def move_aside(output: str) -> None:
    """Renames the folder of an earlier run, if there is one; nothing is deleted.

    What the check of this run's datasets has just written stays.

    Args:
        output: becomes `output.previous`, `output.previous-2` and so on, whichever is free.
    """
    folder = Path(output).resolve()
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= _NO_RUN:
        return
    previous, number = folder.with_name(f"{folder.name}.previous"), 1
    while previous.exists():
        number += 1
        previous = folder.with_name(f"{folder.name}.previous-{number}")
    folder.rename(previous)
    print(f"{folder} was moved to {previous}", flush=True)
    if (previous / FAULTS_FILE).exists():
        folder.mkdir()
        (previous / FAULTS_FILE).rename(folder / FAULTS_FILE)


def describe_output(output: str) -> str:
    """What a run left where, a line each."""
    folder = Path(output).resolve()
    lines = [
        f"  {name:<{max(len(name) for name, _ in _CONTENTS)}}  {what.format(output=folder)}"
        for name, what in _CONTENTS
        if (folder / name).exists()
    ]
    return "\n".join([f"In {folder}:", *lines])


@contextlib.contextmanager
def config_kept(output: str) -> Iterator[None]:
    """Puts the config.yaml of a training back, which Detectron2's `default_setup` writes over.

    --resume, `Predictor` and the report read it.
    """
    config = Path(output, "config.yaml")
    kept = config.read_bytes() if last_checkpoint(output) and config.is_file() else None
    try:
        yield
    finally:
        if kept is not None:
            with new_file(config, force=True) as temporary:
                temporary.write_bytes(kept)
            logger.info("%s stays the training's; this config is in %s", config, RECORD_FILE)


def record_run(output: str, seed: int, *, eval_only: bool) -> None:
    """Adds a line to OUTPUT_DIR/runs.json; earlier lines, of a run that is resumed, stay.

    Args:
        output: the folder, in which Detectron2's `default_setup` has just written config.yaml.
        seed: of the run, also where it was drawn.
    """
    config = Path(output, "config.yaml")
    packages = [each.metadata for each in metadata.distributions()]  # parsed once
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "eval_only": eval_only,
        "seed": seed,
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "versions": dict(sorted((str(each["Name"]), each["Version"]) for each in packages)),
        "config": config.read_text("utf-8") if config.is_file() else None,
    }
    with Path(output, RECORD_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def git_revision() -> str | None:
    """The commit of this package's repository, "-dirty" behind it where files were changed.

    None where the package lies in no repository of its own, as when it is installed from a wheel.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PACKAGE.parent:
            return None  # another project's, in which we lie in a virtual environment
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def settle_seed(seed: int, output: str | None = None, *, resume: bool = False) -> int:
    """The seed of a run, the same in all processes, which all are to call this.

    Args:
        seed: as the config gives it; below 0 one is drawn, or with `resume` read.
        output: the run's folder, where it is written; None: nowhere.
        resume: go on with the seed that `output` holds.
    """
    if comm.is_main_process():
        file = Path(output or "", SEED_FILE)
        known = int(file.read_text()) if resume and output and file.is_file() else None
        if seed < 0:
            seed = secrets.randbelow(2**31) if known is None else known
        elif known is not None and known != seed:
            logger.warning(
                "The run in %s had SEED %d; with %d it goes on as another one", output, known, seed
            )
        if output:
            with new_file(file, force=True) as temporary:
                temporary.write_text(f"{seed}\n")
    return comm.all_gather(seed)[0]

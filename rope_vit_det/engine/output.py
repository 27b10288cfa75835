"""The folder of a run: not written over unasked, and what lies in it at the end."""

import argparse
from pathlib import Path

from ..data.check import FAULTS_FILE
from ..errors import InputError
from .checkpoint_files import LAST
from .distributed import is_first_process
from .record import RECORD_FILE

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
    elif not (args.resume or args.eval_only) and Path(output, LAST).is_file():
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
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {FAULTS_FILE}:
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

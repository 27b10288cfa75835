"""Checkpoints as files: written whole or not at all, found again, pruned."""

import contextlib
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DiskFullError, InputError
from ..utils.atomic_files import new_file
from ..weights.safe import check_state, load_torch_file

LAST = "last_checkpoint"
FINAL = "model_final.pth"
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")

logger = logging.getLogger(__name__)


def write_checkpoint(path: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Writes a checkpoint: to a temporary file, onto the disk, and then under its name.

    Temporary files that killed processes left in the folder are removed first.

    Raises:
        DiskFullError: it cannot be written; names the last good one, which is as it was.
    """
    folder = Path(path).parent
    for left in folder.glob(".model_*.tmp"):
        left.unlink(missing_ok=True)
    with _replaced(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:
            # torch's writer turns the error of a full disk into one about positions.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def tag_checkpoint(folder: str | os.PathLike, name: str) -> None:
    """Makes a checkpoint of a folder the one that runs resume from.

    Raises:
        DiskFullError: this cannot be written.
    """
    with _replaced(Path(folder, LAST)) as temporary:
        temporary.write_text(name)


@contextlib.contextmanager
def _replaced(path: str | os.PathLike) -> Iterator[Path]:
    try:
        with new_file(path, force=True) as temporary:
            yield temporary
    except InputError as error:
        raise cannot_write(Path(path).parent, str(error)) from None


def cannot_write(folder: str | os.PathLike, reason: str) -> DiskFullError:
    """The error with what to do about it, and the last good checkpoint."""
    return DiskFullError(
        f"{reason}; make room and go on with --resume; the last good checkpoint is "
        f"{last_good_checkpoint(folder) or 'none'}"
    )


def prune_checkpoints(folder: str | os.PathLike, keep: int) -> None:
    """Removes the oldest periodic checkpoints, `model_0001234.pth`, and keeps all others.

    Args:
        keep: how many periodic ones stay, 1 or more.
    """
    periodic = [path for path in Path(folder).iterdir() if _PERIODIC.fullmatch(path.name)]
    for path in _newest_first(periodic)[keep:]:
        logger.info("Removing %s: SOLVER.KEEP_CHECKPOINTS %d", path, keep)
        path.unlink(missing_ok=True)


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint that a folder names as its last, there or not; None where it names none."""
    tag = Path(folder, LAST)
    return tag.with_name(tag.read_text().strip() or FINAL) if tag.is_file() else None


def read_last_checkpoint(folder: str | os.PathLike) -> tuple[str, Mapping[str, Any]] | None:
    """The checkpoint that a run resumes from: the one of `last_checkpoint` if it is whole.

    Otherwise its fault is logged and the newest whole one is taken.

    Returns:
        Its path and what it holds; None where the folder has no `last_checkpoint`.

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    faults: list[str] = []
    for path in checkpoint_candidates(folder):
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            faults.append(str(error))
            continue
        if faults:
            logger.warning("%s; resuming from the one before, %s", "; ".join(faults), path)
        return str(path), checkpoint
    if faults:
        raise InputError(f"no checkpoint to resume from: {'; '.join(faults)}; begin a new training")
    return None


def last_good_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint without NaNs, as :func:`read_last_checkpoint` takes it."""
    for path in checkpoint_candidates(folder):
        with contextlib.suppress(InputError):
            read_checkpoint(path, mmap=True)
            return str(path)
    return None


def checkpoint_candidates(folder: str | os.PathLike) -> Iterator[Path]:
    """Those that a run may resume from, in this order; they may be damaged."""
    named = last_checkpoint(folder)
    if named is None:
        return
    yield named
    yield from _newest_first(
        path
        for path in named.parent.iterdir()
        if path != named and (path.name == FINAL or _PERIODIC.fullmatch(path.name))
    )


def read_checkpoint(path: str | os.PathLike, *, mmap: bool = False) -> Mapping[str, Any]:
    """A checkpoint that is whole, to its last bit.

    Args:
        mmap: see :func:`~rope_vit_det.weights.safe.load_torch_file`.

    Raises:
        InputError: it is not.
    """
    checkpoint = load_torch_file(path, mmap=mmap)
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        raise InputError(f"{path} is no checkpoint")
    check_tensors(path, checkpoint["model"])
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            wrong = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile):
        wrong = "its end"
    if wrong:
        raise InputError(f"{path} is damaged at {wrong}")
    return checkpoint


def check_tensors(filename: str | os.PathLike, model: Any) -> None:
    """Checks the weights of a checkpoint.

    Raises:
        InputError: they are no tensors, or have NaNs.
    """
    check_state(filename, model, "checkpoint")
    for key, value in model.items():
        if torch.as_tensor(value).isnan().any():
            raise InputError(f"{filename}: tensor {key} has NaN values; use an earlier checkpoint")


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    """The one that a checkpoint was written at; not by its time, which copies change."""
    periodic = _PERIODIC.fullmatch(path.name)
    if periodic:
        return int(periodic[1])
    try:
        return int(load_torch_file(path, mmap=True)["iteration"])
    except (InputError, TypeError, KeyError, ValueError):
        return -1

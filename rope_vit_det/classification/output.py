"""Classes and embeddings as CSV or npz, each file whole or not at all."""

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..errors import InputError
from ..utils.atomic_files import check_new_file, new_file
from .classify import Classes, Embeddings

SUFFIXES = (".csv", ".npz")


def check_output(path: str | os.PathLike[str]) -> None:
    """Finds out, before the work, whether results can be written to a path.

    Raises:
        InputError: it has another suffix, or :func:`~rope_vit_det.utils.atomic_files.check_folder`.
    """
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"{path}: the name of the output must end in {' or '.join(SUFFIXES)}")
    check_new_file(path, force=True)


def write_classes(classes: Classes, path: str | os.PathLike[str] | None) -> None:
    """One row an image: its path, then class and probability of the most probable, and so on.

    An npz has the arrays `paths` (N,), `classes`, `indices` and `probabilities` (N, k).

    Args:
        path: ends in .csv or .npz; a file that is there is replaced. None: CSV to stdout.
    """
    names = np.array(classes.names)[classes.indices]  # (N, k)
    ranks = range(1, names.shape[1] + 1)
    header = [f"{what}_{rank}" for rank in ranks for what in ("class", "probability")]
    columns = np.stack((names, classes.probabilities.astype(str)), axis=2).reshape(len(names), -1)
    arrays = {"classes": names, "indices": classes.indices, "probabilities": classes.probabilities}
    _write(path, classes.paths, header, columns, arrays)


def write_embeddings(embeddings: Embeddings, path: str | os.PathLike[str] | None) -> None:
    """One row an image: its path, then the numbers. An npz has `paths` (N,), `embeddings` (N, C).

    Args:
        path: see :func:`write_classes`.
    """
    values = embeddings.embeddings
    header = [f"embedding_{i}" for i in range(values.shape[1])]
    _write(path, embeddings.paths, header, values, {"embeddings": values})


def _write(
    path: str | os.PathLike[str] | None,
    paths: Sequence[str],
    header: list[str],
    columns: np.ndarray,
    arrays: dict[str, Any],
) -> None:
    rows = ([image, *row.astype(str)] for image, row in zip(paths, columns, strict=True))
    if path is None:
        _write_csv(sys.stdout, header, rows)
        return
    with new_file(path, force=True) as temporary:
        if Path(path).suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, paths=np.array(paths), **arrays)
        else:
            # Names of files may hold bytes that are no UTF-8.
            with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
                _write_csv(f, header, rows)


def _write_csv(file: TextIO, header: list[str], rows: Iterable[list[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", *header])
    writer.writerows(rows)

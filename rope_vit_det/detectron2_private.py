"""What this package uses of Detectron2 and fvcore that they do not document, in one place.

A new version may take each of these away; `tests/test_detectron2_private.py` then says which. It
also lists what subclasses of theirs, elsewhere in this package, use of themselves.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from unittest.mock import patch

from detectron2.engine.hooks import IterationTimer
from detectron2.utils import logger
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn
from torch.utils.data import Sampler


def without_shared_keys(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Keys that a state dict lacks, but for those of a parameter that it has by another name."""
    return sorted(_filter_reused_missing_keys(model, missing))


def endless_indices(sampler: Sampler) -> Iterator[int] | None:
    """The stream of one of Detectron2's training samplers, of all processes; None: of another's."""
    stream = getattr(sampler, "_infinite_indices", None)
    return None if stream is None else stream()


def time_every_iteration(timer: IterationTimer) -> None:
    """Has a timer that was not yet used leave none out."""
    timer._warmup_iter = 0


def last_written(writer: JSONWriter | TensorboardXWriter) -> int:
    """The last iteration of which a writer has written."""
    return int(writer._last_write)


def go_on_after(writer: JSONWriter | TensorboardXWriter, iteration: int) -> str | None:
    """Has a writer go on after an iteration; the file of a JSONWriter, which is not cut there."""
    writer._last_write = iteration
    if isinstance(writer, JSONWriter):
        return str(writer._file_handle.name)
    writer._writer_args["purge_step"] = iteration + 1
    return None


def logged_once() -> AbstractContextManager:
    """Forgets afterwards what was logged meanwhile of that which is logged but once."""
    return patch.dict(logger._LOG_COUNTER)

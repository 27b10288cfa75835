"""The logged numbers of a run, over a resume."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter


class EventHistory(HookBase):
    """Saves the event storage with checkpoints, and restores it.

    A resumed run forgets what was written after its checkpoint: `metrics.json` is cut there, so
    that it holds every iteration once.
    """

    def __init__(self, writers: Sequence[EventWriter] = ()) -> None:
        """
        Args:
            writers: of this process.
        """
        # CommonMetricPrinter writes nothing that stays.
        self._writers = [w for w in writers if isinstance(w, JSONWriter | TensorboardXWriter)]
        self._loaded: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        scalars = {}
        for name, history in storage.histories().items():
            values, iterations = zip(*history.values(), strict=True)
            scalars[name] = {
                "values": torch.tensor(values, dtype=torch.float64),
                "iterations": torch.tensor(iterations, dtype=torch.int64),
                "smoothing": storage.smoothing_hints()[name],
            }
        written = max((writer._last_write for writer in self._writers), default=-1)
        return {"scalars": scalars, "written": written}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = state_dict

    def before_train(self) -> None:
        for name, saved in self._loaded.get("scalars", {}).items():
            values, iterations = saved["values"].tolist(), saved["iterations"].tolist()
            for value, iteration in zip(values, iterations, strict=True):
                self.trainer.storage.put_scalar(name, value, saved["smoothing"], iteration)
        written = self._loaded.get("written", self.trainer.start_iter - 1)
        self._loaded = {}
        for writer in self._writers:
            writer._last_write = written
            if isinstance(writer, JSONWriter):
                cut_metrics(writer._file_handle.name, written)
            else:
                writer._writer_args["purge_step"] = written + 1


def cut_metrics(path: str | os.PathLike, last: int) -> None:
    """Drops what a `metrics.json` holds of iterations after `last`, and a line that is not whole.

    In place, since it is open for appending.
    """
    end = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                later = json.loads(line)["iteration"] > last
            except (ValueError, KeyError, TypeError):
                later = True
            if later or not line.endswith(b"\n"):
                break
            end += len(line)
    os.truncate(path, end)

"""What happens between the steps of a run: checkpoints, averages, the best one, the log."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint.checkpoint_files import last_checkpoint
from ..detectron2_private import go_on_after, last_written
from ..errors import StoppedError
from ..layers.graphs import ReplayedInference


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
        hints, scalars = storage.smoothing_hints(), {}
        for name, history in storage.histories().items():
            values, numbers = torch.tensor(history.values(), dtype=torch.float64).T.contiguous()
            saved = {"values": values, "iterations": numbers.long(), "smoothing": hints[name]}
            scalars[name] = saved
        written = max(map(last_written, self._writers), default=-1)
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
            file = go_on_after(writer, written)
            if file is not None:
                cut_metrics(file, written)


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


class StopTraining(BaseException):
    """Raised by a hook to end the training; no `Exception`, which Detectron2 logs as a failure."""


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which remembers the best over a resume, and may end the training.

    It belongs into every process, behind the hook that evaluates.
    """

    def __init__(
        self, eval_period: int, checkpointer: Checkpointer, val_metric: str, patience: int = 0
    ) -> None:
        """
        Args:
            eval_period: of the evaluations, in iterations.
            checkpointer: saves `model_best.pth`, and `model_final.pth` when the training ends here.
            val_metric: where more is better, such as "bbox/AP".
            patience: evaluations in a row without a better one that end the training; 0: none do.
        """
        super().__init__(eval_period, checkpointer, val_metric)
        self.patience = patience
        self.num_worse = 0

    def state_dict(self) -> dict[str, Any]:
        names = ("best_metric", "best_iter", "num_worse")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.__dict__.update(state_dict)

    def _best_checking(self) -> None:
        iteration = self.trainer.iter
        if comm.is_main_process():  # which alone knows the results
            before = self.best_iter
            super()._best_checking()
            # Before there is a first one, none is worse.
            is_worse = before is not None and self.best_iter == before
            self.num_worse = self.num_worse + 1 if is_worse else 0
        stop = bool(self.patience) and self.num_worse >= self.patience
        if self.patience and iteration + 1 < self.trainer.max_iter and comm.all_gather(stop)[0]:
            self._checkpointer.save("model_final", iteration=iteration)
            raise StopTraining(
                f"iteration {iteration}: {self.patience} evaluations without a better "
                f"{self._val_metric} than {self.best_metric:.5f} of iteration {self.best_iter}"
            )


class Checkpoints(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which also stops the training at a signal, with a checkpoint.

    It belongs into every process, before the hooks that evaluate and those that write: a checkpoint
    is the state between, and a resumed run begins with them. While a single process evaluates, it
    stops at the next image; several would wait for each other, and stop after the evaluation.
    """

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """While this is entered, signals stop the training."""
        self._stop_request = self.trainer.step.stop_request
        model = self.checkpointer.model
        with self._stop_request, ExitStack() as hooked:  # torch's handles take them off again
            # Test-time augmentation calls parts of the model alone.
            for module in (model, *model.children()):
                hooked.enter_context(module.register_forward_pre_hook(self._before_forward))
            yield

    def before_train(self) -> None:
        super().before_train()
        self._saved = self.trainer.start_iter - 1  # the iteration of the newest checkpoint

    def after_step(self) -> None:
        iteration = self.trainer.iter
        # Several processes have agreed within the step.
        stop = self._stop_request.in_any_process or self._alone_and_signalled()
        due = (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1
        if stop or due:
            self.trainer.running_state.gather()
        if due:
            super().after_step()
            self._saved = iteration
        if stop:
            self._stop()

    def _stop(self) -> None:
        done = min(self.trainer.iter, self.max_iter - 1)
        if self._saved != done:
            self.checkpointer.save(f"model_{done:07d}", iteration=done)
        comm.synchronize()  # nobody leaves before it is written
        raise StoppedError(
            f"{self._stop_request.signal or 'a signal to another process'} after iteration {done}; "
            f"the checkpoint is {last_checkpoint(self.checkpointer.save_dir)}; go on with --resume"
        )

    def _before_forward(self, module: nn.Module, arguments: tuple) -> None:
        if not module.training and self._alone_and_signalled():
            self._stop()

    def _alone_and_signalled(self) -> bool:
        return comm.get_world_size() == 1 and self._stop_request.signal is not None


class EMA(HookBase):
    """Averages the weights after every step, with torch's :class:`AveragedModel`.

    Buffers are copied. The average begins at the weights that the training begins at.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the trained one, not under :class:`DistributedDataParallel`.
            decay: weight of the old average in the new one.

        Attributes:
            model: the averaged one, for evaluation.
        """
        self._trained = model
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._average.eval().requires_grad_(False)
        # At 0 the first update would copy the weights after the first step.
        self._average.n_averaged.fill_(1)
        self.model = self._average.module
        values = (value for module in self.model.modules() for value in vars(module).values())
        self._replayed = [each for each in values if isinstance(each, ReplayedInference)]

    def after_step(self) -> None:
        self._average.update_parameters(self._trained)
        for each in self._replayed:  # the trained model's own end as it trains
            each.clear()


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, for the averaged model.

    It belongs behind :class:`EMA`, which copies the trained model's statistics at every step, and
    before what saves and evaluates.
    """

    def __init__(self, of_trained: hooks.PreciseBN, model: nn.Module) -> None:
        """
        Args:
            of_trained: the hook that Detectron2 made for the trained model.
            model: the averaged one, in evaluation mode.
        """
        self.__dict__.update(vars(of_trained))
        self._model = model

    def update_stats(self) -> None:
        self._model.train()  # the layers in training mode are those that are updated
        super().update_stats()
        self._model.eval()

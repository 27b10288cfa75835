"""The training loop of a run that can end at any moment, and go on as the run it was."""

import errno
import functools
from collections.abc import Callable
from typing import Any

from detectron2.engine import TrainerBase, hooks
from detectron2.solver import LRMultiplier
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.checkpoint_files import cannot_write
from ..checkpoint.checkpointer import DetectorCheckpointer
from ..checkpoint.running_state import RunningState
from ..detectron2_private import time_every_iteration
from ..errors import RunError
from .divergence import end_diverged
from .hooks import Checkpoints
from .train_step import NotFiniteError, TrainStep

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _End(BaseException):
    """An error that ends the run; no `Exception`, whose traceback Detectron2 logs."""

    def __init__(self, error: RunError) -> None:
        self.error = error


def _ends_the_run(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: "ResumableTrainer", *args: Any) -> Any:
        try:
            return method(self, *args)
        except RunError as error:
            raise _End(error) from None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            folder = self.checkpointer.save_dir
            reason = f"a file of {folder} cannot be written: {error.strerror}"
            raise _End(cannot_write(folder, reason)) from None

    return wrapped


class ResumableTrainer(TrainerBase):
    """Stops with checkpoints and one-line errors, and resumes exactly; a base before another one.

    The trainer has a :class:`Checkpoints` among its hooks. What comes before it in the list is in
    the checkpoint; what comes after it (evaluation, writing) is done again after a resume.
    """

    checkpointer: DetectorCheckpointer
    running_state: RunningState

    def train(self, *args: Any) -> None:
        """See :class:`TrainerBase`.

        Raises:
            RunError: a signal, a loss that is not finite, or a full disk ended the training.
        """
        with self._checkpoints.stopping():
            try:
                super().train(*args)
            except _End as end:
                raise end.error from None

    @_ends_the_run
    def before_train(self) -> None:
        resumed = self.start_iter > 0
        if resumed:
            for hook in self._hooks:
                if isinstance(hook, hooks.IterationTimer):
                    time_every_iteration(hook)  # as without the resume
        super().before_train()
        if resumed:
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks:
                if isinstance(getattr(hook, "scheduler", None), LRScheduler):
                    _set_rates(hook.scheduler)
            for hook in self._hooks[self._hooks.index(self._checkpoints) + 1 :]:
                hook.after_step()

    @_ends_the_run
    def run_step(self) -> None:
        try:
            super().run_step()
        except NotFiniteError as error:
            folder = self.checkpointer.save_dir
            raise end_diverged(error, self.step, self.running_state, folder) from None

    @_ends_the_run
    def after_step(self) -> None:
        super().after_step()

    @_ends_the_run
    def after_train(self) -> None:
        self.storage.iter = self.iter
        # A failure in the last iteration looks like the end of training to Detectron2's hooks; the
        # collectives of an evaluation would wait for the other processes, which are elsewhere.
        finished = self.iter >= self.max_iter
        for hook in self._hooks:
            if finished or not isinstance(hook, hooks.EvalHook | hooks.BestCheckpointer):
                hook.after_train()

    @property
    def step(self) -> TrainStep:
        """What makes the steps: `_trainer` of Detectron2's trainers, or the trainer itself."""
        return self._trainer if hasattr(self, "_trainer") else self

    @property
    def _checkpoints(self) -> Checkpoints:
        return next(hook for hook in self._hooks if isinstance(hook, Checkpoints))


def _set_rates(scheduler: LRScheduler) -> None:
    """Has a schedule of before go on with the rates, and by the rule, that are set now."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    if isinstance(scheduler, LRMultiplier):  # of others, how far they are is theirs to know
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate

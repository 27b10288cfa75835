"""When a run writes checkpoints: periodically, at its end, and when a signal stops it."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from ..errors import StoppedError
from .checkpoint import DetectorCheckpointer
from .distributed import in_any_process
from .running_state import RunningState
from .signals import StopRequest


class Checkpoints(hooks.PeriodicCheckpointer):
    """Detectron2's hook, which also stops the training at a signal, with a checkpoint.

    It belongs into every process, before the hooks that evaluate and those that write: a checkpoint
    is the state between, and a resumed run begins with them. While a single process evaluates, it
    stops at the next image; several would wait for each other, and stop after the evaluation.
    """

    def __init__(
        self, checkpointer: DetectorCheckpointer, period: int, running_state: RunningState
    ) -> None:
        """
        Args:
            checkpointer: of the evaluated model.
            period: in iterations.
            running_state: one of the checkpointer's.
        """
        super().__init__(checkpointer, period)
        self.stop_request = StopRequest()
        self._running_state = running_state
        self._saved = -1  # the iteration of the newest checkpoint

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """While this is entered, signals stop the training."""
        with self.stop_request:
            handle = self.checkpointer.model.register_forward_pre_hook(self._before_forward)
            try:
                yield
            finally:
                handle.remove()

    def before_train(self) -> None:
        super().before_train()
        self._saved = self.trainer.start_iter - 1

    def after_step(self) -> None:
        iteration = self.trainer.iter
        stop = in_any_process(self.stop_request.signal is not None)
        due = (iteration + 1) % self.period == 0 or iteration >= self.max_iter - 1
        if stop or due:
            self._running_state.gather()
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
            f"{self.stop_request.signal or 'a signal to another process'} after iteration {done}; "
            f"the checkpoint is {self.checkpointer.get_checkpoint_file()}; go on with --resume"
        )

    def _before_forward(self, module: nn.Module, arguments: tuple) -> None:
        evaluating = not module.training and comm.get_world_size() == 1
        if evaluating and self.stop_request.signal is not None:
            self._stop()

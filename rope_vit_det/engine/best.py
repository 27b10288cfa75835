"""The best checkpoint of a run, and the end of a run that gets no better."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ..errors import InputError

logger = logging.getLogger(__name__)


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

    def after_step(self) -> None:
        super().after_step()
        stop = bool(self.patience) and self.num_worse >= self.patience
        # Only the main process knows the results.
        if self.patience and self._has_just_evaluated() and comm.all_gather(stop)[0]:
            iteration = self.trainer.iter
            self._checkpointer.save("model_final", iteration=iteration)
            raise StopTraining(
                f"iteration {iteration}: {self.patience} evaluations without a better "
                f"{self._val_metric} than {self.best_metric:.5f} of iteration {self.best_iter}"
            )

    def state_dict(self) -> dict[str, Any]:
        names = ("best_metric", "best_iter", "num_worse")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        vars(self).update(state_dict)

    def _has_just_evaluated(self) -> bool:
        done = self.trainer.iter + 1
        return done % self._period == 0 and done != self.trainer.max_iter

    def _best_checking(self) -> None:
        if not comm.is_main_process():
            return
        known = self.trainer.storage.latest()
        if self._val_metric not in known:
            metrics = ", ".join(key for key in known if "/AP" in key) or "none"
            raise InputError(
                f"SOLVER.BEST_METRIC is {self._val_metric!r}; the evaluation gives: {metrics}"
            )
        before = self.best_iter
        super()._best_checking()
        self.num_worse = self.num_worse + 1 if self.best_iter == before else 0

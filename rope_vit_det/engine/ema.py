"""An exponential moving average of the weights."""

from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(HookBase):
    """Averages the weights after every step, with torch's :class:`AveragedModel`.

    Buffers are copied. The average begins at the weights that the training begins at.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the trained one, under :class:`DistributedDataParallel` or not.
            decay: weight of the old average in the new one.
        """
        self._trained = model.module if isinstance(model, DistributedDataParallel) else model
        self._average = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._average.eval().requires_grad_(False)
        # At 0 the first update would copy the weights after the first step.
        self._average.n_averaged.fill_(1)

    @property
    def model(self) -> nn.Module:
        """The averaged model, for evaluation."""
        return self._average.module

    @property
    def trained_model(self) -> nn.Module:
        """The model whose weights are averaged."""
        return self._trained

    def after_step(self) -> None:
        self._average.update_parameters(self._trained)

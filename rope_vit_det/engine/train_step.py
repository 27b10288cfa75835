"""One training step: micro-batches, precision, and the random state of each."""

import functools
import logging
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.resume import carry_over, describe_groups
from ..data.loader import MicroBatchSampler
from ..distributed.launch import gather_numbers
from ..distributed.signals import StopRequest
from ..errors import InputError, RunError
from ..layers.cpu import is_slow_at_bf16
from ..utils.seeding import Purpose, seed_all

logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """A micro-batch: its number in the step over all processes, its data, and its losses.

    No losses where the model gave up, as Detectron2's RPN does over boxes that are not finite; the
    reason is in `failure` then.
    """

    number: int
    data: list[dict]
    losses: dict[str, Tensor]
    failure: str = ""


class NotFiniteError(Exception):
    """The loss of this or another process is not finite; the weights are as before the step."""

    def __init__(self, micro_batches: list[MicroBatch]) -> None:
        """
        Args:
            micro_batches: of this process, those whose loss is not finite.
        """
        super().__init__(f"the loss of {len(micro_batches)} micro-batches is not finite")
        self.micro_batches = micro_batches


class TrainStep(SimpleTrainer):
    """Detectron2's :class:`SimpleTrainer` with gradient accumulation and mixed precision.

    The gradient of a step is the mean over its micro-batches, of this process and (through
    :class:`DistributedDataParallel`) of all others; so are the losses that are logged. Before each
    micro-batch the random state is set from (seed, iteration, micro-batch), which makes a step of
    two processes the step of one that accumulates over two. Detectron2's :class:`AMPTrainer` has
    none of this, and insists on CUDA and a gradient scaler, which bf16 does not need.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        accumulate: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model: returns a dict of losses.
            data_loader: gives the micro-batches of this process, one after another.
            seed: of the run.
            accumulate: micro-batches of this process in a step.
            precision: of the forward pass: float32, or bfloat16 or float16 under autocast; float16
                with a gradient scaler, on a GPU only. On CPUs whose bfloat16 is the slower one,
                that is float32, too.
        """
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.accumulate = accumulate
        self.stop_request = StopRequest()
        # Batch norm over all processes: their layers wait for each other in every pass.
        self._layers_wait = any("SyncBatchNorm" in type(m).__name__ for m in model.modules())
        self._batches: Iterator[list[dict]] | None = None
        self.device_type = next(model.parameters()).device.type
        if precision == torch.bfloat16 and is_slow_at_bf16(self.device_type):
            logger.info("bfloat16 is slower than float32 on this CPU: training in float32")
            precision = torch.float32
        self.precision = precision
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._groups = describe_groups(optimizer, inner)
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=precision == torch.float16
        )

    def run_step(self) -> None:
        assert self.model.training, "[TrainStep] model was changed to eval mode!"
        data_time, done = 0.0, []
        self.optimizer.zero_grad()
        for number in range(self.accumulate):
            start = time.perf_counter()
            data = self._next_batch()
            data_time += time.perf_counter() - start
            last = number == self.accumulate - 1
            # All but a step's last micro-batch are spared the average over processes.
            stays = not last and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if stays else nullcontext():
                done.append(self._try_forward(data, comm.get_rank() * self.accumulate + number))
                # Before a backward pass in which the other processes would wait for this one.
                if last or done[-1].failure or self._layers_wait:
                    losses, data_times = self._agree(done, data_time)
                loss = total_loss(done[-1].losses) / self.accumulate
                self.grad_scaler.scale(loss).backward()
        self.after_backward()
        self._log(losses, data_times)
        # Where there is a scale. Clipping, part of the optimizer's step, comes after that and after
        # the average over processes; a fused optimizer would unscale behind the clipping.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _try_forward(self, data: list[dict], micro_batch: int) -> MicroBatch:
        try:
            return MicroBatch(micro_batch, data, self.forward(data, micro_batch))
        except FloatingPointError as error:
            return MicroBatch(micro_batch, data, {}, str(error))

    def _agree(
        self, done: list[MicroBatch], data_time: float
    ) -> tuple[dict[str, float], list[float]]:
        """Shares losses, failures and a request to stop, in one collective.

        Returns:
            The means over micro-batches and processes, and the data times of the processes.

        Raises:
            NotFiniteError: a loss is not finite, or the model gave up, in any process.
        """
        values = _values(done)
        wrong = [
            each
            for each, losses in zip(done, values, strict=True)
            if each.failure or not np.isfinite(sum(losses.values()))
        ]
        means = {} if wrong else {n: float(np.mean([v[n] for v in values])) for n in values[0]}
        names = sorted(means)
        stop = self.stop_request.signal is not None
        crc = zlib.crc32(" ".join(names).encode())
        own = [bool(wrong), stop, crc, data_time, *(means[name] for name in names)]
        failed, stops, crcs, data_times, *rest = gather_numbers(own, self.device_type)
        self.stop_request.in_any_process = any(stops)
        if any(failed):
            raise NotFiniteError(wrong)
        if len(set(crcs)) > 1:
            raise RunError(f"the processes have different losses; one has {', '.join(names)}")
        columns = dict(zip(names, rest, strict=False))
        return {name: float(np.mean(columns[name])) for name in means}, data_times

    def _log(self, losses: Mapping[str, float], data_times: Sequence[float]) -> None:
        """As :meth:`SimpleTrainer.write_metrics`, which gathers by itself."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_times[comm.get_rank()])
        if comm.is_main_process():
            total = {"total_loss": sum(losses.values()), **losses}
            storage.put_scalars(data_time=max(data_times), **total)

    def forward(self, data: list[dict], micro_batch: int) -> dict[str, Tensor]:
        """The losses of a micro-batch, under its random state.

        Args:
            micro_batch: its number in the step, over all processes.
        """
        seed_all(self.seed, Purpose.STEP, self.iter, micro_batch)
        mixed = self.precision != torch.float32
        # Scripted functions (fvcore's focal loss) are optimized after two calls and compute
        # otherwise from then on: a resumed run would differ in the last bit.
        optimized = torch.jit.optimized_execution(self.device_type != "cpu")
        with torch.autocast(self.device_type, dtype=self.precision, enabled=mixed), optimized:
            losses = self.model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def state_dict(self) -> dict:
        own = {"grad_scaler": self.grad_scaler.state_dict(), "groups": self._groups}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict) -> None:
        """What of the optimizer is set otherwise now, such as its rates, stays as it is."""
        optimizer = carry_over(state_dict["optimizer"], state_dict.get("groups"), self._groups)
        super().load_state_dict(state_dict | {"optimizer": optimizer})
        # Empty, or not there, in checkpoints of a run without a scaler.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _next_batch(self) -> list[dict]:
        if self._batches is None:
            sampler = getattr(self.data_loader, "batch_sampler", None)
            if isinstance(sampler, MicroBatchSampler):
                sampler.start = self.iter * self.accumulate
            self._batches = iter(self.data_loader)
        return next(self._batches)


def build_train_step(
    cfg: CfgNode,
    model: nn.Module,
    data_loader: Iterable[list[dict]],
    optimizer: torch.optim.Optimizer,
) -> TrainStep:
    """The step that SOLVER.AMP and SOLVER.ACCUMULATE ask for."""
    return TrainStep(
        model,
        data_loader,
        optimizer,
        seed=cfg.SEED,
        accumulate=cfg.SOLVER.ACCUMULATE,
        precision=training_precision(cfg),
    )


def training_precision(cfg: CfgNode) -> torch.dtype:
    """That of the forward pass, by SOLVER.AMP."""
    return getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else torch.float32


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a model's losses.

    Raises:
        InputError: there are none.
    """
    if not losses:
        raise InputError("the model returns no losses to train on")
    return functools.reduce(torch.add, losses.values())


def _values(done: list[MicroBatch]) -> list[dict[str, float]]:
    """The losses of micro-batches, with one wait for the device."""
    losses = [loss.detach().reshape(()) for each in done for loss in each.losses.values()]
    values = iter(torch.stack(losses).tolist() if losses else ())
    return [{name: next(values) for name in each.losses} for each in done]

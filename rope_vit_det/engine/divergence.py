"""Losses that are not finite: the batch is written down, the run ends, the batch is replayed."""

import os
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..checkpoint.checkpoint_files import last_good_checkpoint
from ..checkpoint.resume import RunningState
from ..errors import DivergedError, InputError
from ..utils.atomic_files import new_file
from ..weights.safe import load_torch_file
from .train_step import NotFiniteError, TrainStep

_STRUCTURES = [Instances, Boxes, RotatedBoxes, BitMasks, PolygonMasks, Keypoints]


def end_diverged(
    error: NotFiniteError, step: TrainStep, state: RunningState, output: str
) -> DivergedError:
    """Writes down the micro-batches whose loss is not finite; a collective.

    Args:
        error: of this process, which may have none.
        step: that raised it, with the weights from before it.
        state: of the model.
        output: folder for the files, and of the checkpoints.
    """
    reports = []  # what is said of a micro-batch, and its file
    for micro in error.micro_batches:
        file = Path(output, f"diverged_{step.iter:07d}_{micro.number}.pth")
        dump = {
            "model": state.model.state_dict(),
            "running_state": state.own(),
            "seed": step.seed,
            "iteration": step.iter,
            "micro_batch": micro.number,
            "batch": micro.data,
        }
        with new_file(file, force=True) as temporary:
            torch.save(dump, temporary)
        losses = ", ".join(f"{name} {loss.item():.4g}" for name, loss in micro.losses.items())
        losses = losses or f'none ("{micro.failure}")'
        ids = [str(record.get("image_id", record.get("file_name"))) for record in micro.data]
        reports.append((f"{losses} for images {', '.join(ids)}", str(file)))
    reports = [report for part in comm.all_gather(reports) for report in part]
    good = last_good_checkpoint(output) if comm.is_main_process() else None
    good = comm.all_gather(good)[0] or "none"
    found = "; ".join(text for text, _ in reports)
    return DivergedError(
        f"the loss is not finite at iteration {step.iter}: {found}; the last good checkpoint is "
        f"{good}; to see where it begins, repeat the command with --replay {reports[0][1]}"
    )


def replay(model: nn.Module, path: str | os.PathLike, *, precision: torch.dtype) -> None:
    """Computes the losses of a written-down batch once more, and prints where they go wrong.

    Args:
        model: of the config that the run had; gets the weights of the file.
        path: of a file of :func:`end_diverged`.
        precision: as of :class:`TrainStep`.

    Raises:
        InputError: the file is none of these, or of another model.
    """
    with torch.serialization.safe_globals(_STRUCTURES):
        dump = load_torch_file(path)
    if not isinstance(dump, dict) or "micro_batch" not in dump:
        raise InputError(f"{path} is no batch of a diverged run")
    try:
        model.load_state_dict(dump["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} belongs to another config than this: {reason}") from None
    RunningState(model).load_state_dict({"processes": [dump["running_state"]]})
    wrong = [name for name, value in dump["model"].items() if not torch.isfinite(value).all()]
    if wrong:
        print(f"weights that are not finite: {len(wrong)}, the first is {wrong[0]}")
    first: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: (
                first.append(name) if not first and not _finite(output) else None
            )
        )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainStep(model, [], optimizer, seed=dump["seed"], precision=precision)
    step.iter = dump["iteration"]
    losses = {}
    with EventStorage(step.iter):
        try:
            losses = step.forward(dump["batch"], dump["micro_batch"])
        except FloatingPointError as error:
            print(f"no losses: {error}")
    print(f"first output that is not finite: of {first[0] if first else 'no module'}")
    for name, loss in losses.items():
        print(f"{name} {loss.item():.6g}")


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        return all(map(_finite, output.values()))
    return not isinstance(output, list | tuple) or all(map(_finite, output))

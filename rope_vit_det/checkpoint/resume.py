"""What a resumed run may change: settings are compared, the optimizer's state is carried over.

And what it has from the run before beside weights and optimizer: what modules remember.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from ..errors import InputError
from ..weights.safe import load_torch_file
from .checkpoint_files import checkpoint_candidates

Settings = Mapping[str, Any]
"""Keys in full to plain values, as they lie in a checkpoint."""

# What places alone, or has words of its own.
_OF_THE_PLACE = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "SEED"),
    *("train.output_dir", "train.init_checkpoint", "train.seed"),
)
# Another value makes another model or optimizer, of which the checkpoint has nothing.
_FIXED = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.ROPE_VIT.NAME",
    "MODEL.ROPE_VIT.FREEZE_BLOCKS",
    "MODEL.ROPE_VIT.LORA.RANK",
    "MODEL.ROPE_VIT.LORA.ALPHA",
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "SOLVER.OPTIMIZER",
    "SOLVER.LAYER_DECAY",
    "optimizer._target_",
)
_LENGTHS = ("SOLVER.MAX_ITER", "train.max_iter")


def kept_settings(settings: Settings) -> dict[str, Any]:
    """Those that a checkpoint holds: not where a run lies, nor where it began."""
    return {key: value for key, value in settings.items() if key not in _OF_THE_PLACE}


def check_resume(folder: str | os.PathLike, settings: Settings) -> None:
    """Checks, without reading tensors, that a run may go on with these settings.

    Args:
        folder: OUTPUT_DIR; where it has no checkpoints, nothing is checked.
        settings: of the run that is to go on.

    Raises:
        InputError: see :func:`changed_settings`.
    """
    for path in checkpoint_candidates(folder):
        with suppress(InputError):  # whoever reads it whole will say what is wrong
            checkpoint = load_torch_file(path, mmap=True)
            break
    else:
        return
    changed_settings(str(path), checkpoint, settings)


def changed_settings(path: str, checkpoint: Any, settings: Settings) -> list[str]:
    """What is set otherwise than in the run that wrote a checkpoint, as "KEY (old -> new)".

    Args:
        path: for the message.
        checkpoint: one without settings, of another trainer, tells no difference.

    Raises:
        InputError: one that cannot change in a run, or fewer iterations than are done.
    """
    of_ours = checkpoint if isinstance(checkpoint, Mapping) else {}
    before, done = of_ours.get("settings") or {}, of_ours.get("iteration")
    for key in _LENGTHS:
        if isinstance(done, int) and settings.get(key, done + 1) <= done:
            raise InputError(
                f"{key} is {settings[key]}, and the run has done {done + 1} iterations ({path}): "
                f"set {key} to more, or evaluate it with --eval-only --resume"
            )
    changed = {
        key: f"{key} ({before[key]!r} -> {value!r})"
        for key, value in kept_settings(settings).items()
        if key in before and _plain(before[key]) != _plain(value)
    }
    fixed = [text for key, text in changed.items() if key in _FIXED]
    if fixed:
        # Adapters can be added to weights that have none.
        lora = ("RANK", "ALPHA") if before.get("MODEL.ROPE_VIT.LORA.RANK") else ()
        of_weights = {"MODEL.ROPE_VIT.NAME", *(f"MODEL.ROPE_VIT.LORA.{key}" for key in lora)}
        other = "or start anew from other weights: another OUTPUT_DIR, no --resume"
        raise InputError(
            f"--resume cannot go on with another {', '.join(fixed)}, of which {path} has no "
            "optimizer state; set it back, "
            + (start_anew(path) if of_weights.isdisjoint(changed) else other)
        )
    return list(changed.values())


def start_anew(path: str) -> str:
    """The way on where a checkpoint cannot be resumed from."""
    return f"or start anew from its weights: MODEL.WEIGHTS {path}, another OUTPUT_DIR, no --resume"


def describe_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The groups of a newly built optimizer: their settings, and the "names" of what they hold."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        held = [names.get(id(p), f"{number}.{i}") for i, p in enumerate(group["params"])]
        groups.append(settings | {"names": held})
    return groups


def carry_over(
    saved: Mapping[str, Any], before: list[dict[str, Any]] | None, now: list[dict[str, Any]]
) -> dict[str, Any]:
    """An optimizer's saved state for one whose settings may be others, and its groups with them.

    What was not set otherwise stays as it was saved, to the bit.

    Args:
        saved: its `state_dict()`.
        before: its :func:`describe_groups`; None: another trainer saved it.
        now: those of the optimizer that is to go on.

    Returns:
        For its `load_state_dict`.

    Raises:
        InputError: it learns other parameters.
    """
    groups = saved["param_groups"]
    if before is None and [len(g["params"]) for g in groups] == [len(g["names"]) for g in now]:
        # The rates that they were built with are where a schedule noted them.
        before = [
            {**group, "lr": group.get("initial_lr", group["lr"]), "names": new["names"]}
            for group, new in zip(groups, now, strict=True)
        ]
    places = {
        name: (index, group, built)
        for group, built in zip(groups, before or (), strict=False)
        for index, name in zip(group["params"], built["names"], strict=True)
    }
    names = [name for group in now for name in group["names"]]
    other = sorted(places.keys() ^ set(names))
    if other:
        raise InputError(
            f"its optimizer learned {len(other)} parameters more or less, the first is {other[0]}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    state = {
        numbers[name]: saved["state"][index]
        for name, (index, _, _) in places.items()
        if index in saved["state"]
    }
    return dict(saved) | {"state": state, "param_groups": [_group(g, places, numbers) for g in now]}


def _group(now: dict[str, Any], places: Mapping[str, tuple], numbers: Mapping[str, int]) -> dict:
    _, saved, built = places[now["names"][0]]
    changed = {k: v for k, v in now.items() if k != "names" and (k not in built or built[k] != v)}
    if "lr" in changed:
        # The schedule, which knows how far it is, sets it again where it can tell from that.
        share = saved["lr"] / built["lr"] if built["lr"] else 1.0
        changed |= {"initial_lr": now["lr"], "lr": now["lr"] * share}
    return {**saved, **changed, "params": [numbers[name] for name in now["names"]]}


class RunningState:
    """A checkpointable of the numbers that modules change, and of other processes' buffers.

    Detectron2's RetinaNet and FCOS keep the normalizer of their loss as a plain attribute. Batch
    norm's statistics differ between processes, and a checkpoint's "model" has those of the first.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the trained one, newly built.
        """
        self.model = model
        self._initial = set(self._numbers())
        self._gathered: list[dict[str, Any]] = []

    def gather(self) -> None:
        """Collects the state of all processes for the next checkpoint; a collective."""
        if comm.get_world_size() > 1:
            self._gathered = comm.gather(self.own())

    def state_dict(self) -> dict[str, Any]:
        return {"processes": self._gathered or [self.own()]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes this process's part; with more processes than there were, the first one's."""
        parts, rank = state_dict["processes"], comm.get_rank()
        part = parts[rank if rank < len(parts) else 0]
        modules = dict(self.model.named_modules())
        for module, name, value in part["numbers"]:
            if module in modules:
                setattr(modules[module], name, value)
        buffers = dict(self.model.named_buffers())
        for name, value in part["buffers"].items():
            if name in buffers:
                buffers[name].copy_(value)

    def own(self) -> dict[str, Any]:
        """This process's part."""
        changed = [each for each in self._numbers() if each not in self._initial]
        saved = self.model.state_dict(keep_vars=True)
        buffers = {
            name: buffer.detach().cpu().clone()
            for name, buffer in self.model.named_buffers()
            if name in saved and not comm.is_main_process()
        }
        return {"numbers": changed, "buffers": buffers}

    def _numbers(self) -> list[tuple[str, str, float]]:
        """Module, attribute and value of each."""
        return [
            (path, name, value)
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if type(value) in (int, float)
        ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""What a model remembers from step to step outside its weights, in every process of its own."""

from collections.abc import Mapping
from typing import Any

from detectron2.utils import comm
from torch import nn


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
        self._initial = self._numbers()
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
        changed = [
            (module, name, value)
            for (module, name), value in self._numbers().items()
            if self._initial.get((module, name)) != value
        ]
        saved = self.model.state_dict(keep_vars=True)
        buffers = {
            name: buffer.detach().cpu().clone()
            for name, buffer in self.model.named_buffers()
            if name in saved and not comm.is_main_process()
        }
        return {"numbers": changed, "buffers": buffers}

    def _numbers(self) -> dict[tuple[str, str], float]:
        return {
            (path, name): value
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if type(value) in (int, float)
        }

"""Training and evaluation, only where Detectron2's own engine does not do."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Trainer"]


def __getattr__(name: str) -> Any:
    """Imports the trainer when it is asked for: a command line's `--help` does without."""
    if name != "Trainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import Trainer

    return Trainer

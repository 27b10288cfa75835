"""Detectron2's checkpointer, with errors that name the file, the classes, and averaged weights."""

import os
import pickle
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..data.classes import Classes
from ..errors import InputError

BEST = "model_best.pth"


class DetectorCheckpointer(DetectionCheckpointer):
    """A :class:`DetectionCheckpointer` that refuses weights which do not fit the backbone.

    The backbone refuses half a load by itself, in any script; here the message gains the file, and
    the shapes that Detectron2 would drop with a log line.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        classes: Classes | None = None,
        trained_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: what is evaluated, and saved as "model".
            save_dir: for the checkpoints.
            classes: saved as "classes".
            trained_model: the one that learns, where `model` is an average of its weights; saved as
                "trained_model" for a resume. Whatever else is loaded, it gets the weights of
                `model`.
            kwargs: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.classes = classes
        self.trained_model = trained_model
        if trained_model is not None:
            self.add_checkpointable("trained_model", trained_model)

    def save(self, name: str, **kwargs: Any) -> None:
        """See `fvcore.common.checkpoint.Checkpointer.save`."""
        if self.classes is not None:
            kwargs["classes"] = self.classes
        super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See `fvcore.common.checkpoint.Checkpointer.tag_last_checkpoint`."""
        # The best lies beside the others: a run resumes from the last.
        if last_filename_basename != BEST:
            super().tag_last_checkpoint(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `fvcore.common.checkpoint.Checkpointer.load`.

        Raises:
            InputError: the file is missing, or its backbone is not this model's.
        """
        try:
            check_weights_path(path)
            return super().load(path, *args, **kwargs)
        except InputError as error:
            raise InputError(f"MODEL.WEIGHTS {path}: {error}") from None

    def _load_model(self, checkpoint: Any) -> Any:
        weights = checkpoint["model"]
        for name, own in self.model.state_dict().items():
            found = weights.get(name)
            if ".net." not in name or not hasattr(found, "shape"):
                continue
            if tuple(found.shape) != tuple(own.shape):
                raise InputError(
                    f"{name} has shape {tuple(found.shape)} in the checkpoint and "
                    f"{tuple(own.shape)} in the model; set MODEL.ROPE_VIT.NAME and IMAGE_SIZE to "
                    "what the checkpoint was made with"
                )
        incompatible = super()._load_model(checkpoint)
        if self.trained_model is not None:
            self.trained_model.load_state_dict(self.model.state_dict())
        return incompatible


def read_classes(path: str) -> Classes | None:
    """The classes that a checkpoint was trained on; None for one that does not say.

    Args:
        path: of a checkpoint of :class:`DetectorCheckpointer`. Other files say nothing.
    """
    if not path.endswith(".pth") or not os.path.isfile(path):
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    return checkpoint.get("classes") if isinstance(checkpoint, dict) else None


def check_weights_path(path: str) -> None:
    """Finds out without a download whether MODEL.WEIGHTS can be the weights of a RoPE ViT.

    Raises:
        InputError: it cannot, or the file does not exist.
    """
    if path.startswith("detectron2://"):
        raise InputError(
            "Detectron2's model zoo has no RoPE ViT, this is another network; set MODEL.WEIGHTS to "
            "weights of a RoPE ViT, or to '' to start from random weights"
        )
    if path.startswith("birder://"):
        raise InputError(
            "loading published weights by name is not there yet; set MODEL.WEIGHTS to '' to start "
            "from random weights"
        )
    if path and "://" not in path and not PathManager.isfile(path):
        raise InputError("no such file")

"""Detectron2's checkpointer, with errors that name the file."""

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from ..errors import InputError


class DetectorCheckpointer(DetectionCheckpointer):
    """A :class:`DetectionCheckpointer` that refuses weights which do not fit the backbone.

    The backbone refuses half a load by itself, in any script; here the message gains the file, and
    the shapes that Detectron2 would drop with a log line.
    """

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
        return super()._load_model(checkpoint)


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

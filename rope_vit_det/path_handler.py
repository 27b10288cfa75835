"""`birder://` and `timm://` addresses for Detectron2's PathManager, and so for MODEL.WEIGHTS."""

import os
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager

from .errors import InputError
from .weights.detectron2_format import detectron2_checkpoint
from .weights.load import PREFIXES


class WeightsPathHandler(PathHandler):
    """Gives the address of published weights the local path of a checkpoint made from them."""

    def _get_supported_prefixes(self) -> list[str]:
        return list(PREFIXES)

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(detectron2_checkpoint(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise InputError(f"{path} can only be read")
        return open(self._get_local_path(path), mode, buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            return os.path.exists(self._get_local_path(path))
        except InputError:
            return False

    _isfile = _exists


PathManager.register_handler(WeightsPathHandler())

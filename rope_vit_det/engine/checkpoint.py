"""Where :mod:`rope_vit_det.checkpoint.checkpointer` was before 0.2."""

from ..checkpoint.checkpointer import DetectorCheckpointer, read_classes

__all__ = ["DetectorCheckpointer", "read_classes"]

"""AP of exported files, beside that of what they were made from."""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from tabulate import tabulate
from torch import Tensor, nn

from ..config.keys import with_settings
from ..engine.trainer import Trainer
from ..errors import RunError
from .traced_detector import pad, to_instances


class ExportedDetector(nn.Module):
    """An exported detector with the interface of Detectron2's, for its evaluation."""

    def __init__(self, run: Callable[[Tensor, Tensor], Mapping[str, Tensor]], step: int) -> None:
        """
        Args:
            run: from an image and its size to tensors, see
                :func:`~rope_vit_det.export.traced_detector.trace_detector`.
            step: of which height and width are multiples.
        """
        super().__init__()
        self.run = run
        self.step = step

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As Detectron2's meta architectures."""
        return [{"instances": self._find(each)} for each in inputs]

    def _find(self, item: dict[str, Any]) -> Instances:
        image = item["image"]
        height, width = image.shape[-2:]
        found = to_instances(self.run(*pad(image.float(), self.step)), (height, width))
        return detector_postprocess(found, item.get("height", height), item.get("width", width))


def compare_ap(
    cfg: CfgNode, detector: nn.Module, exported: Mapping[str, nn.Module], most: float
) -> dict[str, float]:
    """Evaluates detectors on DATASETS.TEST, prints what they reach, and gives the first's.

    Args:
        exported: by the precision of inference; the first is judged.
        most: AP points, of 100, that it may lose on any task.

    Raises:
        RunError: it loses more.
    """
    models = {("eager", "f32"): detector}
    models |= {("exported", precision): model for precision, model in exported.items()}
    with tempfile.TemporaryDirectory() as folder:  # a training's own results stay
        cfg = with_settings(cfg, {"OUTPUT_DIR": folder})
        found = [_average_precisions(Trainer.test(cfg, model)) for model in models.values()]
    eager, first = found[:2]
    headers = ["model", "inference", *(f"{task} AP" for task in eager)]
    rows = [[*name, *each.values()] for name, each in zip(models, found, strict=True)]
    print(tabulate(rows, headers, "github", floatfmt=".3f"), flush=True)
    lost = {task: eager[task] - first[task] for task in eager}
    if not all(each <= most for each in lost.values()):
        losses = ", ".join(f"{task} {each:.3f}" for task, each in lost.items())
        raise RunError(f"AP lost: {losses}: more than --max-ap-loss {most}; nothing was written")
    return first


def _average_precisions(results: Mapping[str, Any]) -> dict[str, float]:
    """Every AP of results, which nest by dataset where there are several."""
    flat = flatten_results_dict(results)
    return {k[:-3].replace("/", " "): float(flat[k]) for k in flat if k.endswith("/AP")}

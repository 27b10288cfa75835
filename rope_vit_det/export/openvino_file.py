"""Models in OpenVINO's format, made of ONNX, and run by OpenVINO."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MapDataset, get_detection_dataset_dicts
from torch import Tensor

from ..data.readable import ReadableMapper

CALIBRATION_IMAGES = 100


def calibration_images(
    cfg: CfgNode, dataset: str, prepare: Callable[[Tensor], tuple[Tensor, ...]]
) -> MapDataset:
    """Images of a dataset, evenly spaced, as inputs of a model.

    Args:
        dataset: registered.
        prepare: from an image (3, H, W), float32, in its test size, to inputs.
    """
    mapper: Any = ReadableMapper(DatasetMapper(cfg, is_train=False))
    records = get_detection_dataset_dicts(dataset, filter_empty=False)
    count = min(len(records), CALIBRATION_IMAGES)
    records = [records[i * len(records) // count] for i in range(count)]
    return MapDataset(records, lambda record: prepare(mapper(record)["image"].float()))


def inference_precisions() -> list[str]:
    """Those that OpenVINO has on this CPU: "f32", and "bf16" where it is no slower."""
    import openvino

    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["f32", "bf16"] if "BF16" in found else ["f32"]


def save_openvino(
    path: Path,
    weights: Path,
    info: str,
    *,
    fp16: bool = False,
    images: Sequence[Sequence[Tensor]] | None = None,
) -> None:
    """Puts a model in OpenVINO's format in the place of a file of ONNX.

    Args:
        path: of the ONNX file, which becomes the .xml one.
        weights: of the .bin file.
        info: for the model's `rt_info`, as "info".
        fp16: weights are kept in half the precision.
        images: inputs to quantise the model with, to 8 bits; None: it stays as it is.
    """
    import onnx.inliner
    import openvino

    # OpenVINO knows no functions of ours.
    graph = onnx.inliner.inline_local_functions(onnx.load(str(path)))
    model = openvino.Core().read_model(graph.SerializeToString())
    if images is not None:
        model = _quantize(model, images)
    model.set_rt_info(info, "info")
    draft = path.with_suffix(".xml")  # OpenVINO chooses the format by it
    try:
        openvino.save_model(model, draft, compress_to_fp16=fp16)
        os.replace(draft.with_suffix(".bin"), weights)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
        draft.with_suffix(".bin").unlink(missing_ok=True)


def load_openvino(path: Path, weights: Path, precision: str) -> Callable[..., dict[str, Tensor]]:
    """A function from the inputs of a model, in their order, to its outputs.

    Args:
        precision: of inference, see :func:`inference_precisions`.
    """
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": precision}
    model = core.read_model(path, weights)
    names = [output.any_name for output in model.outputs]  # a compiled one may have others
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        # `infer` does not raise on a single core, and gives what it gave before.
        request.start_async([tensor.numpy() for tensor in tensors])
        request.wait()
        found = (torch.tensor(output.data) for output in request.output_tensors)
        return dict(zip(names, found, strict=True))

    return run


def _quantize(model: Any, images: Sequence[Sequence[Tensor]]) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset(images, lambda tensors: [tensor.numpy() for tensor in tensors]),
        subset_size=CALIBRATION_IMAGES,
        model_type=nncf.ModelType.TRANSFORMER,
    )

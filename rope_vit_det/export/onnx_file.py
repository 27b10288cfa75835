"""Models as ONNX, and run by ONNX Runtime."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError, check_packages
from .onnx_detector import FIND_KEYPOINTS, NMS
from .onnx_text import CHECK, CUT, DOMAIN, FUNCTIONS, KEEP
from .pyramid import REFUSAL

_OPSET = 20
_LONGEST = 300  # characters of an exporter's error
_ALL = 2**62


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    shapes: tuple[Any, ...],
    outputs: Sequence[str],
    step: int,
    info: str,
) -> bytes:
    """A model as ONNX; for a process of its own, since the exporter may take it with it.

    Args:
        inputs: by name, as `forward` takes them: images, and the height and width of what counts.
        shapes: which of their dimensions are free, see `torch.export`.
        outputs: names of what `forward` gives.
        step: of which height and width are multiples; the graph refuses other images.
        info: for the model's metadata, as "info".

    Raises:
        InputError: a package is missing.
        RunError: the exporter fails.
    """
    check_packages("onnx", "onnxscript", "onnxruntime", extra="export")
    import onnx

    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=shapes,
                input_names=[f"checked_{name}" for name in inputs],
                output_names=list(outputs),
                custom_translation_table={NMS: _suppress, FIND_KEYPOINTS: _find_keypoints},
                verbose=False,
            )
        assert program is not None  # as without dynamo
        proto = program.model_proto
        _use_functions(proto)
        _check_inputs(proto, step)
        entry = proto.metadata_props.add()
        entry.key, entry.value = "info", info
        onnx.checker.check_model(proto)
        return proto.SerializeToString()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        words = " ".join(f"{type(cause).__name__} {cause}".split())[:_LONGEST]
        raise RunError(f"torch.onnx.export failed: {words}; nothing was written") from None


def load_onnx(path: str | os.PathLike[str]) -> Callable[..., dict[str, Tensor]]:
    """A function from the inputs of a model, in their order, to its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        arrays = (tensor.numpy() for tensor in tensors)
        found = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
        return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

    return run


def _use_functions(model: Any) -> None:
    """Puts the functions into a model that it calls, and ours in the place of slow operators."""
    from onnx import helper, parser

    for node in model.graph.node:
        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if options.get("mode") == b"cubic" and not options.get("antialias"):
            image, _, _, size = node.input
            name, output = node.name, node.output[0]
            node.CopyFrom(
                helper.make_node("ResizeBicubic", [image, size], [output], name, domain=DOMAIN)
            )
    if any(node.domain == DOMAIN for node in model.graph.node):
        model.functions.extend(map(parser.parse_function, FUNCTIONS))
        if DOMAIN not in {each.domain for each in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _check_inputs(model: Any, step: int) -> None:
    """Puts checks of height and width in front of a graph."""
    from onnx import parser

    graph = model.graph
    for each in graph.input:
        each.name = each.name.removeprefix("checked_")
    image = graph.input[0]
    cuts = len(graph.input) > 1
    others = len(image.type.tensor_type.shape.dim) - 2
    text = (CHECK + (CUT if cuts else KEEP)).format(
        image=image.name,
        multiples=[1] * others + [step, step],
        refusal=REFUSAL.format(step=step),
        step=step,
    )
    head = "front (float image, int64 size) => (float checked)"
    nodes = parser.parse_graph(f"{head} {{{text}\n}}").node
    for node in nodes:
        node.name = node.output[0]
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _suppress(boxes: Any, scores: Any, overlap: float, least: float) -> Any:
    op: Any = importlib.import_module("onnxscript").opset20
    limits = (op.Constant(value_floats=[each]) for each in (overlap, least))
    return op.NonMaxSuppression(boxes, scores, op.Constant(value_ints=[_ALL]), *limits)


def _find_keypoints(heatmaps: Any, boxes: Any) -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    x, y, out = (OpSchema.FormalParameter(name, "tensor(float)") for name in "xyz")
    schema = OpSchema("FindKeypoints", DOMAIN, 1, inputs=[x, y], outputs=[out])
    return Op(Opset(DOMAIN, 1), "FindKeypoints", schema)(heatmaps, boxes)

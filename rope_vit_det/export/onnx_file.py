"""Models as ONNX, and run by ONNX Runtime."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..utils.own_process import in_own_process
from .onnx_detector import FIND_KEYPOINTS, NMS
from .sizes import REFUSAL

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 20
_LONGEST = 300  # characters of an exporter's error
_ALL = 2**62
_DOMAIN = "rope_vit_det"
# In front of the graph. ONNX has no assertions: what is wrong makes a shape of too many elements.
# (An index out of bounds is an error to ONNX Runtime, but not to OpenVINO.)
_CHECK = """
    multiples = Constant <value_ints = {multiples}> ()
    shape = Shape ({image})
    rest = Mod (shape, multiples)
    same = Add (shape, rest)
    {refusal} = Reshape ({image}, same)"""
_KEEP = """
    checked_{image} = Identity ({refusal})"""
# What lies beyond the size and its multiple is cut off.
_CUT = """
    one = Constant <value_ints = [1]> ()
    axes = Constant <value_ints = [1, 2]> ()
    sides = Gather (shape, axes)
    below = Less (size, one)
    above = Greater (size, sides)
    either = Or (below, above)
    wrong = Cast <to = 7> (either)
    checked_size = Identity (size)
    surplus = ReduceSum (wrong)
    elements = Add (shape, surplus)
    size_must_be_that_of_a_part_of_the_image = Reshape ({refusal}, elements)
    step = Constant <value_ints = [{step}]> ()
    negative = Neg (size)
    missing = Mod (negative, step)
    end = Add (size, missing)
    start = Constant <value_ints = [0, 0]> ()
    checked_image = Slice (size_must_be_that_of_a_part_of_the_image, start, end, axes)"""

# A box after the other, since each is enlarged to its own size.
_FIND_KEYPOINTS = """
<opset_import: ["": 20], domain: "rope_vit_det">
FindKeypoints (heatmaps, boxes) => (keypoints) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    reversed = Constant <value_ints = [1, 0]> ()
    half = Constant <value_float = 0.5> ()
    yes = Constant <value = bool {1}> ()
    start, end = Split <axis = 1, num_outputs = 2> (boxes)
    least = CastLike (one, boxes)
    difference = Sub (end, start)
    sides = Max (difference, least)
    pixels = Ceil (sides)
    steps = Div (sides, pixels)
    shape = Shape <start = 0, end = 2> (heatmaps)
    number, joints = Split <num_outputs = 2> (shape)
    flat = Concat <axis = 0> (joints, rest)
    places = Loop (number, yes) <body = find (int64 i, bool go) => (bool go_on, float[K, 3] found) {
        go_on = Identity (go)
        at = Unsqueeze (i, zero)
        width_height = Gather <axis = 0> (pixels, i)
        step = Gather <axis = 0> (steps, at)
        corner = Gather <axis = 0> (start, at)
        whole = Cast <to = 7> (width_height)
        height_width = Gather (whole, reversed)
        width = Gather (whole, zero)
        size = Concat <axis = 0> (one, joints, height_width)
        heatmap = Gather <axis = 0> (heatmaps, at)
        large = Resize <mode = "cubic", cubic_coeff_a = -0.75> (heatmap, , , size)
        logits = Reshape (large, flat)
        best = ReduceMax (logits, one)
        place = ArgMax <axis = 1> (logits)
        x = Mod (place, width)
        y = Div (place, width)
        xy = Concat <axis = 1> (x, y)
        cells = CastLike (xy, half)
        centers = Add (cells, half)
        inside = Mul (centers, step)
        placed = Add (inside, corner)
        small = Reshape (heatmap, flat)
        below = Sub (small, best)
        parts = Exp (below)
        sum = ReduceSum (parts, one)
        score = Reciprocal (sum)
        found = Concat <axis = 1> (placed, score)
    }>
    three = Constant <value_ints = [3]> ()
    all = Concat <axis = 0> (shape, three)
    keypoints = Reshape (places, all)
}"""


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    shapes: tuple[Any, ...],
    outputs: Sequence[str],
    step: int,
    info: str,
) -> bytes:
    """A model as ONNX, by an exporter in a process of its own.

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
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs {', '.join(missing)}: pip install 'rope-vit-det[export]', or these alone"
        )
    work = partial(_export, model, dict(inputs), shapes, list(outputs), step, info)
    return in_own_process(work, "torch.onnx.export")


def load_onnx(path: str | os.PathLike[str]) -> Callable[..., dict[str, Tensor]]:
    """A function from the inputs of a model, in their order, to its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs, outputs = (
        [each.name for each in some] for some in (session.get_inputs(), session.get_outputs())
    )

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        arrays = (tensor.numpy() for tensor in tensors)
        found = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
        return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

    return run


def _export(
    model: nn.Module,
    inputs: dict[str, Tensor],
    shapes: tuple[Any, ...],
    outputs: list[str],
    step: int,
    info: str,
) -> bytes:
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
                output_names=outputs,
                custom_translation_table={NMS: _suppress, FIND_KEYPOINTS: _find_keypoints},
                verbose=False,
            )
        assert program is not None  # as without dynamo
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        words = " ".join(f"{type(cause).__name__} {cause}".split())[:_LONGEST]
        raise RunError(f"torch.onnx.export failed: {words}; nothing was written") from None
    proto = program.model_proto
    if any(node.domain == _DOMAIN for node in proto.graph.node):
        proto.functions.append(onnx.parser.parse_function(_FIND_KEYPOINTS))
    _check_inputs(proto, step)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "info", info
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _check_inputs(model: Any, step: int) -> None:
    """Puts checks of height and width in front of a graph."""
    from onnx import parser

    graph = model.graph
    for each in graph.input:
        each.name = each.name.removeprefix("checked_")
    image = graph.input[0]
    cuts = len(graph.input) > 1
    others = len(image.type.tensor_type.shape.dim) - 2
    text = (_CHECK + (_CUT if cuts else _KEEP)).format(
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
    from onnxscript.values import Op, Opset

    return Op(Opset(_DOMAIN, 1), "FindKeypoints")(heatmaps, boxes)

"""Backbones with their pyramid, by `torch.export` and as ONNX."""

import importlib.util
import warnings
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import InputError
from ..utils.torch_private import assert_in_graph, drop_guards

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_OPSET = 20
# Shown by the runtime where an image of another size is refused.
REFUSAL = "height_and_width_must_be_multiples_of_{step}"


class Pyramid(nn.Module):
    """A detector's backbone, from pixels."""

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, detector: nn.Module, step: int | None = None) -> None:
        """
        Args:
            detector: Detectron2's.
            step: of which height and width must be multiples, to be checked in the graph of
                `torch.export`; None: they are not.
        """
        super().__init__()
        self.backbone = detector.backbone
        self.step = step
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, detector.get_buffer(name).detach().clone())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W), 0 to 255, in the channel order of INPUT.FORMAT, to feature maps."""
        if self.step is not None:
            # On tensors: to the exporter, sizes are multiples already, and nothing to check.
            for side in images.shape[-2:]:
                rest = torch.scalar_tensor(side, dtype=torch.int64) % self.step
                assert_in_graph(rest == 0, f"height and width must be multiples of {self.step}")
        return self.backbone((images - self.pixel_mean) / self.pixel_std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The images that normalised ones were."""
        return images * self.pixel_std + self.pixel_mean


def export_pyramid(pyramid: Pyramid, images: Tensor, step: int) -> ExportedProgram:
    """A pyramid by `torch.export`, with any batch, height and width.

    Args:
        images: (2 or more, 3, H, W) to export with.
        step: of which height and width are multiples.
    """
    with torch.no_grad():
        program = torch.export.export(pyramid, (images,), dynamic_shapes=_dynamic(pyramid, step))
    # Newer torch would refuse other sizes by what it concluded from the multiple, in terms that
    # nobody can read, before the check in the graph. Ranges are checked all the same.
    drop_guards(program)
    return program


def export_onnx(pyramid: Pyramid, images: Tensor, step: int, info: str) -> Any:
    """A pyramid as an ONNX model, with any batch, height and width; other sizes are refused.

    Args:
        pyramid, images, step: as of :func:`export_pyramid`, without a check in the graph.
        info: for the model's metadata, as "info".

    Returns:
        An `onnx.ModelProto`.

    Raises:
        InputError: a package is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs {', '.join(missing)}: pip install 'rope-vit-det[export]', or these alone"
        )
    names = sorted(pyramid.backbone.output_shape())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            pyramid,
            (images,),
            dynamo=True,
            opset_version=ONNX_OPSET,
            dynamic_shapes=_dynamic(pyramid, step),
            input_names=["images"],
            output_names=names,
            verbose=False,
        )
    assert program is not None  # as without dynamo
    model = program.model_proto
    _refuse_other_sizes(model, step)
    entry = model.metadata_props.add()
    entry.key, entry.value = "info", info
    return model


def _dynamic(pyramid: Pyramid, step: int) -> tuple[dict[int, Any]]:
    # What `torch.export` serves: two cells on the coarsest level, and more.
    coarsest = max(int(shape.stride) for shape in pyramid.backbone.output_shape().values())
    least = coarsest // step + 1
    sides = {2: step * Dim("rows", min=least), 3: step * Dim("columns", min=least)}
    return ({0: Dim("batch", min=1), **sides},)


def _refuse_other_sizes(model: Any, step: int) -> None:
    """Puts a check of height and width in front of an ONNX graph, which has no assertions.

    The rest of the division is an index into a list of a single zero; what it yields is added to
    the shape, so that no optimizer takes the check out.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    image = graph.input[0].name

    def constant(name: str, values: list[int]) -> str:
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        graph.initializer.append(tensor)
        return name

    steps = constant("size_check_steps", [1, 1, step, step])
    zero = constant("size_check_zero", [0])
    checked = "size_check_images"
    refusal = REFUSAL.format(step=step)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == image:
                node.input[i] = checked
    nodes = [
        helper.make_node("Shape", [image], ["size_check_shape"]),
        helper.make_node("Mod", ["size_check_shape", steps], ["size_check_rest"]),
        helper.make_node("Gather", [zero, "size_check_rest"], [refusal], name=refusal),
        helper.make_node("Add", ["size_check_shape", refusal], ["size_check_same"]),
        helper.make_node("Reshape", [image, "size_check_same"], [checked]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)

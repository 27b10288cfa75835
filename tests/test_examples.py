"""What users copy first, run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from rope_vit_det.data.demo.dataset import generate_demo_dataset
from rope_vit_det.export.onnx_file import _check_inputs
from rope_vit_det.export.openvino_file import save_openvino

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_runs(trained_folder, small_demo_dataset, tmp_path):
    for name, folder in (("datasets", small_demo_dataset.parent), ("output/demo", trained_folder)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    examples = tmp_path / "examples"  # Jupyter starts where the notebook lies
    examples.mkdir()
    cells = json.loads((EXAMPLES / "predict_and_features.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(code)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=examples)
    assert answer.returncode == 0, answer.stderr
    assert " objects " in answer.stdout and "(1, 192, 8, 10) (1, 192)" in answer.stdout


# A backbone whose windows are of 14 cells: it takes multiples of 224 px.
STEP = 224
TEXT = """
<ir_version: 10, opset_import: ["": 20]>
backbone (float[N, 3, H, W] checked_images) => (float[N, 3, R, C] p5)
{ p5 = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (checked_images) }"""


class Backbone(torch.nn.Module):
    def forward(self, images):
        return {"p5": F.avg_pool2d(images, 32)}


@pytest.mark.parametrize("suffix", ["onnx", "xml", "pt2"])
def test_an_exported_backbone_gets_images_of_whole_windows(tmp_path, monkeypatch, capsys, suffix):
    path = tmp_path / f"backbone.{suffix}"
    info = json.dumps({"multiple_of": STEP})
    if suffix == "pt2":
        sides = {2: STEP * torch.export.Dim("rows"), 3: STEP * torch.export.Dim("columns")}
        images = torch.zeros(1, 3, 2 * STEP, 3 * STEP)
        program = torch.export.export(Backbone(), (images,), dynamic_shapes=(sides,))
        torch.export.save(program, path, extra_files={"info.json": info})
    else:
        onnx = pytest.importorskip("onnx")
        model = onnx.parser.parse_model(TEXT)
        _check_inputs(model, STEP)
        onnx.helper.set_model_props(model, {"info": info})
        path.write_bytes(model.SerializeToString())
        if suffix == "xml":
            draft = path.rename(tmp_path / "draft.tmp")
            save_openvino(draft, path.with_suffix(".bin"), info)
            draft.rename(path)
    monkeypatch.setattr(sys, "argv", ["run_backbone.py", str(path)])
    runpy.run_path(str(EXAMPLES / "run_backbone.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith("p5 (1, 3, 21, 28)\n")  # 672x896 px


@pytest.mark.parametrize("shortest_side", [0, 48])
def test_a_detector_gets_images_as_detectron2_would_resize_them(
    tmp_path, monkeypatch, capsys, shortest_side
):
    image = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    given = []

    def detector(padded, size):  # finds the whole image
        given.append((padded, size))
        box = np.array([[0, 0, *size[::-1]]], np.float32)
        return {"pred_boxes": box, "scores": np.ones(1), "pred_classes": np.zeros(1, int)}

    info = {"shortest_side": shortest_side, "longest_side": 70, "multiple_of": 32}
    info |= {"channels": "RGB", "classes": ["disc"]}
    main = runpy.run_path(str(EXAMPLES / "run_detector.py"))["main"]
    monkeypatch.setitem(main.__globals__, "load", lambda path: (detector, info))
    main("", str(tmp_path / "photo.png"), str(tmp_path / "new" / "drawn.png"))
    assert capsys.readouterr().out == "disc 1.00 0 0 150 90\n"
    assert Image.open(tmp_path / "new" / "drawn.png").size == (150, 90)
    resize = ResizeShortestEdge([shortest_side] * 2, info["longest_side"]).get_transform(image)
    expected = resize.apply_image(image).transpose(2, 0, 1)
    ((padded, size),) = given
    height, width = size
    assert (height, width) == expected.shape[1:]
    np.testing.assert_array_equal(padded[:, :height, :width], expected)
    assert not any(side % 32 for side in padded.shape[1:])
    assert not padded[:, height:].any() and not padded[:, :, width:].any()


def test_the_classifier_in_plain_pytorch_learns():
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    losses = example["main"]("rope_vit_reg4_demo16", steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_plain_script_trains_as_well_as_our_tool(tmp_path):
    """Detectron2's own SGD at the zoo's rate reaches 30 box and 13 mask AP; half an hour."""
    generate_demo_dataset(tmp_path / "rope_vit_det_demo")
    root = EXAMPLES.parent
    found = {}
    for script in ("examples/train_plain.py", "tools/train_net.py"):
        out = tmp_path / Path(script).stem
        options = ("--config-file", root / "configs" / "demo.yaml", "OUTPUT_DIR", out)
        subprocess.run(
            [sys.executable, "-W", "ignore", root / script, *options],
            check=True,
            env=os.environ | {"DETECTRON2_DATASETS": str(tmp_path)},
        )
        rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
        found[script] = [row for row in rows if "bbox/AP" in row][-1]
    plain, tools = found.values()
    for metric in ("bbox/AP", "segm/AP"):
        assert plain[metric] > tools[metric] - 3, found

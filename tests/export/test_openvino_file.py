"""Models for OpenVINO beside the ones that they were made of."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import openvino
import pytest
import torch
import torch.nn.functional as F

from rope_vit_det.errors import InputError, RunError
from rope_vit_det.export import export_model as main
from rope_vit_det.export import openvino_file
from rope_vit_det.export.onnx_file import _check_inputs, load_onnx
from rope_vit_det.export.openvino_file import load_openvino, save_openvino

ROOT = Path(__file__).parents[2]
STEP = 32
REFUSED = "height_and_width_must_be_multiples_of_32"
WRONG_PART = "size_must_be_that_of_a_part_of_the_image"


# Takes what a detector takes; exporters need longer for less.
TEXT = """
<ir_version: 10, opset_import: ["": 20, "ours": 1]>
network (float[3, H, W] checked_image, int64[2] checked_size) => (float[1, 8, R, C] features,
                                                                  float[2] scaled)
{
    axis = Constant <value_ints = [0]> ()
    images = Unsqueeze (checked_image, axis)
    patches = Conv <strides = [4, 4]> (images, stem)
    positive = ours.Positive (patches)
    features = Conv <pads = [1, 1, 1, 1]> (positive, head)
    mean = ReduceMean <keepdims = 0> (features)
    factors = CastLike (checked_size, mean)
    scaled = Mul (factors, mean)
}
<domain: "ours", opset_import: ["": 20]>
Positive (x) => (y) { y = Relu (x) }"""
WEIGHTS = {"stem": torch.randn(32, 3, 4, 4) / 255, "head": torch.randn(8, 32, 3, 3)}


def network(image, size):
    patches = F.conv2d(image[None], WEIGHTS["stem"], stride=4).relu()
    features = F.conv2d(patches, WEIGHTS["head"], padding=1)
    return {"features": features, "scaled": size * features.mean()}


@pytest.fixture(scope="module")
def graph():
    """Of the network, in ONNX, with our checks in front."""
    model = onnx.parser.parse_model(TEXT)
    for name, values in WEIGHTS.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.numpy(), name))
    _check_inputs(model, STEP)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def save(graph, folder, **options):
    path, weights = folder / ".new.xml.tmp", folder / ".new.bin.tmp"
    path.write_bytes(graph)
    save_openvino(path, weights, '{"classes": ["ü"]}', **options)
    return path, weights


def test_equals_what_it_was_made_of_and_says_what_it_is(graph, tmp_path):
    path, weights = save(graph, tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, weights.name}
    told = openvino.Core().read_model(path, weights).get_rt_info("info").value
    assert json.loads(told) == {"classes": ["ü"]}
    run = load_openvino(path, weights, "f32")
    for height, width in ((96, 64), (64, 160)):
        inputs = torch.rand(3, height, width) * 255, torch.tensor([height - 5, width])
        torch.testing.assert_close(run(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ["OpenVINO", "ONNX Runtime"])
def test_wrong_sizes_are_refused(graph, tmp_path, runtime):
    path, weights = save(graph, tmp_path)
    (tmp_path / "model.onnx").write_bytes(graph)
    onnx = load_onnx(tmp_path / "model.onnx")
    run = load_openvino(path, weights, "f32") if runtime == "OpenVINO" else onnx
    wrong = [((96, 72), (96, 64), REFUSED), ((65, 64), (64, 64), REFUSED)]
    wrong += [((96, 64), size, WRONG_PART) for size in ((97, 64), (96, 65), (0, 64), (96, -3))]
    for shape, size, reason in wrong:
        with pytest.raises(Exception, match=reason):
            run(torch.zeros(3, *shape), torch.tensor(size))


SINGLE = """
import sys
from pathlib import Path
import torch
from rope_vit_det.export.openvino_file import load_openvino
run = load_openvino(Path(sys.argv[1]), Path(sys.argv[2]), "f32")
run(torch.zeros(3, 96, 64), torch.tensor([96, 64]))
run(torch.zeros(3, 96, 72), torch.tensor([96, 64]))
"""


@pytest.mark.slow
def test_wrong_sizes_are_refused_on_a_single_core(graph, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SINGLE, *map(str, save(graph, tmp_path))]
    one = min(os.sched_getaffinity(0))
    answer = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {one})
    )
    assert answer.returncode and REFUSED in answer.stderr


@pytest.mark.slow
def test_fewer_bits_are_nearly_the_same_and_take_less_room(graph, tmp_path):
    images = [(torch.rand(3, 64, 64) * 255, torch.tensor([64, 64])) for _ in range(8)]
    image, size = images[0]
    expected = network(image, size)["features"]
    kept = {}
    for name, options in (("f32", {}), ("fp16", {"fp16": True}), ("int8", {"images": images})):
        (tmp_path / name).mkdir()
        path, weights = save(graph, tmp_path / name, **options)
        kept[name] = weights.stat().st_size
        found = load_openvino(path, weights, "f32")(image, size)["features"]
        distance = (found - expected).abs().max() / expected.abs().max()
        assert distance < {"f32": 1e-5, "fp16": 1e-3, "int8": 0.05}[name]
        assert name == "f32" or distance > 1e-7
    assert kept["int8"] < kept["fp16"] < kept["f32"]


@pytest.mark.parametrize("number", [3, 100, 199, 250, 1050])
def test_images_of_the_whole_dataset_are_taken_for_8_bits(monkeypatch, number):
    monkeypatch.setattr(
        openvino_file, "get_detection_dataset_dicts", lambda *_, **__: range(number)
    )
    monkeypatch.setattr(openvino_file, "DatasetMapper", lambda *_, **__: None)
    monkeypatch.setattr(
        openvino_file, "ReadableMapper", lambda _: lambda record: {"image": torch.tensor(record)}
    )
    taken = [int(each) for each in openvino_file.calibration_images(None, "any", lambda x: x)]
    assert len(taken) == min(number, 100) and taken[0] == 0
    gaps = [b - a for a, b in itertools.pairwise([*taken, number])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ("d.onnx", {"fp16": True}, "--fp16 and --int8 are for .xml"),
        ("d.xml", {"fp16": True, "int8": "own_train"}, "one of them"),
        ("d.xml", {"fp16": True, "images": ["a.jpg"]}, "--image: --fp16 and --int8 are judged"),
        ("there.xml", {}, r"there\.bin is there already"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, output, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("there.bin").write_text("mine")
    with pytest.raises(InputError, match=reason):
        main.run(config_file=str(ROOT / "configs" / "demo.yaml"), output=output, **options)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["mine"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"openvino, nncf: pip install 'rope-vit-det\[openvino\]'"):
        main.run(config_file="none.yaml", output="d.xml")


def data_options(folder):
    annotations = folder / "annotations"
    return (
        *("INPUT.MIN_SIZE_TEST", "192"),
        *("DATASETS.OWN.VAL_JSON", str(annotations / "instances_val.json")),
        *("DATASETS.OWN.VAL_IMAGES", str(folder / "val")),
        *("DATASETS.OWN.TRAIN_JSON", str(annotations / "instances_train.json")),
        *("DATASETS.OWN.TRAIN_IMAGES", str(folder / "train")),
    )


@pytest.mark.slow
def test_a_detector_runs_without_this_package(
    trained_folder, small_demo_dataset, tmp_path, monkeypatch, capsys
):
    """And quantised to 8 bits it is judged by AP."""
    monkeypatch.chdir(tmp_path)
    options = {"config_file": str(trained_folder), "opts": data_options(small_demo_dataset)}
    main.run(output="detector.xml", part="detector", **options)
    assert "detections in images of" in capsys.readouterr().out
    photo = str(small_demo_dataset / "val" / "000001.jpg")
    code = (
        "import sys; sys.modules['rope_vit_det'] = sys.modules['detectron2'] = None\n"
        f"sys.modules['torch'] = None; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "import run_detector; run_detector.main(*sys.argv[1:], threshold=0.1)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "detector.xml", photo, "drawn.png"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout and Path("drawn.png").stat().st_size

    main.run(output="int8.xml", part="detector", int8="own_train", max_ap_loss=101.0, **options)
    rows = [line.split("|")[1:] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[1].strip() for row in rows[2:4]] == ["f32", "INT8, else f32"]
    assert Path("int8.bin").stat().st_size < 0.4 * Path("detector.bin").stat().st_size
    with pytest.raises(RunError, match="more than --max-ap-loss -101"):
        main.run(output="no.xml", int8="own_val", max_ap_loss=-101.0, **options)
    with pytest.raises(InputError, match="--int8: no dataset is registered as 'nowhere'"):
        main.run(output="no.xml", int8="nowhere", **options)
    assert not list(tmp_path.glob("*no*"))


@pytest.mark.slow
def test_a_backbone_runs_without_this_package(trained_folder, tmp_path):
    path = tmp_path / "backbone.xml"
    main.run(config_file=str(trained_folder), output=str(path))
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples/run_backbone.py"), str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    assert "p3 (1, 64, 64, 96)" in answer.stdout

"""Exported files beside the model they came from, in processes that know nothing of us."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import move_off_initial_values
from torch import nn

from rope_vit_det import add_rope_vit_config
from rope_vit_det.errors import InputError, RunError
from rope_vit_det.export import export_model as main
from rope_vit_det.export.checks import LIMITS, check_images, compare_detections, compare_features
from rope_vit_det.export.pyramid import size_multiple
from rope_vit_det.export.traced_detector import find_instances
from rope_vit_det.models import VARIANTS

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "demo.yaml")
WINDOWS = ("MODEL.ROPE_VIT.WINDOW_SIZE", "4", "MODEL.ROPE_VIT.GLOBAL_BLOCKS", "[3]")


def build(*opts):
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(CONFIG)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    torch.manual_seed(0)
    return cfg, move_off_initial_values(build_model(cfg))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a detector that finds a hundred things in any image."""
    _, model = build()
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    classes = {"names": ["disc", "crate", "tile", "star"], "ids": [1, 2, 3, 4]}
    torch.save({"model": model.state_dict(), "classes": classes}, path)
    return str(path)


def export(weights, output, *opts, **options):
    main.run(
        config_file=CONFIG, weights=weights, output=str(output), threshold=0.0, opts=opts, **options
    )


# A process that has torch and what else the file needs, and can import neither us nor Detectron2.
ALONE = """
import json, sys
sys.modules["rope_vit_det"] = sys.modules["detectron2"] = None
import numpy as np
import torch
path, inputs, outputs = sys.argv[1:]
found = {}
for name, x in np.load(inputs).items():
    try:
        if path.endswith(".onnx"):
            import onnxruntime
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = [o.name for o in session.get_outputs()]
            fed = {"images": x}
            if "detector" in path:
                fed = {"image": x, "size": np.array(x.shape[1:])}
            values = dict(zip(names, session.run(names, fed)))
        elif path.endswith(".pt2"):
            values = torch.export.load(path).module()(torch.from_numpy(x))
        else:
            import torchvision
            values = torch.jit.load(path)(torch.from_numpy(x))
        found |= {f"{name}.{key}": np.asarray(v.detach() if hasattr(v, "detach") else v)
                  for key, v in values.items()}
    except Exception as error:
        found[f"{name}.error"] = np.array(str(error))
np.savez(outputs, **found)
"""


def run_alone(path, images, tmp_path):
    """What the file gives for each image, or its error, from a fresh process."""
    np.savez(tmp_path / "in.npz", **{name: x.numpy() for name, x in images.items()})
    command = [sys.executable, "-W", "ignore", "-c", ALONE, path, "in.npz", "out.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=200)
    results = {name: {} for name in images}
    for key, value in np.load(tmp_path / "out.npz").items():
        name, _, field = key.partition(".")
        results[name][field] = torch.from_numpy(value) if field != "error" else str(value)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ts", ".onnx"])
@pytest.mark.parametrize("opts", [(), WINDOWS])
def test_detector(weights, tmp_path, capsys, opts, suffix):
    path = tmp_path / f"detector{suffix}"
    export(weights, path, *opts, part="detector")
    told = capsys.readouterr().out
    assert "300 detections" in told and str(path) in told
    _, model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *opts)
    model.load_state_dict(torch.load(weights)["model"])
    step = size_multiple(model)
    assert step == (64 if opts else 32)
    sizes = {"a": (128, 192), "b": (320, 128), "c": (64, 64)}
    images = {name: torch.rand(3, *size) * 255 for name, size in sizes.items()}
    refused = {"d": torch.zeros(3, 128, 144), "e": torch.zeros(3, 100, 128)}
    found = run_alone(path, images | refused, tmp_path)
    for name, image in images.items():
        with torch.no_grad():
            expected = find_instances(model, image, torch.tensor(image.shape[-2:]))
        assert len(expected) == 100
        for field in ("scores", "pred_masks", "pred_classes"):
            torch.testing.assert_close(
                found[name][field], getattr(expected, field), rtol=0, atol=1e-5
            )
        boxes = expected.pred_boxes.tensor
        torch.testing.assert_close(found[name]["pred_boxes"], boxes, rtol=0, atol=1e-2)
    for name in refused:
        assert f"multiples of {step}" in found[name]["error"].replace("_", " ")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("opts", [(), WINDOWS])
def test_backbone(weights, tmp_path, opts, suffix):
    path = tmp_path / f"backbone{suffix}"
    export(weights, path, *opts)
    _, model = build(*opts)
    model.load_state_dict(torch.load(weights)["model"])
    step = size_multiple(model)
    sizes = {"a": (1, 256, 320), "b": (3, 448, 192), "c": (2, 192, 192)}
    images = {name: torch.rand(n, 3, h, w) * 255 for name, (n, h, w) in sizes.items()}
    refused = {"d": torch.zeros(1, 3, 256, 272), "e": torch.zeros(1, 3, 260, 256)}
    found = run_alone(path, images | refused, tmp_path)
    for name, image in images.items():
        with torch.no_grad():
            expected = model.backbone((image - model.pixel_mean) / model.pixel_std)
        assert set(found[name]) == set(expected)
        for level, features in expected.items():
            assert (found[name][level] - features).abs().max() < 1e-4 * features.abs().max()
    for name in refused:
        error = found[name]["error"].replace("_", " ")
        assert f"height and width must be multiples of {step}" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("vit_base_patch16_rope_mixed_ape_224", ".onnx"), ("vit_base_patch16_dinov3", ".pt2")],
)
def test_the_backbone_of_another_family(tmp_path, monkeypatch, name, suffix):
    sizes = dict(hidden_dim=64, num_layers=2, num_heads=2, mlp_dim=96)
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name] | sizes)
    opts = ("MODEL.ROPE_VIT.NAME", name, *WINDOWS[:3], "[1]")
    _, model = build(*opts)
    classes = {"names": ["disc", "crate", "tile", "star"], "ids": [1, 2, 3, 4]}
    torch.save({"model": model.state_dict(), "classes": classes}, tmp_path / "model.pth")
    export(str(tmp_path / "model.pth"), tmp_path / f"backbone{suffix}", *opts)
    images = {"a": torch.rand(1, 3, 256, 320) * 255, "b": torch.rand(3, 3, 448, 192) * 255}
    found = run_alone(tmp_path / f"backbone{suffix}", images, tmp_path)
    for key, image in images.items():
        with torch.no_grad():
            expected = model.backbone((image - model.pixel_mean) / model.pixel_std)
        for level, features in expected.items():
            assert (found[key][level] - features).abs().max() < 1e-4 * features.abs().max()


@pytest.mark.slow
def test_a_bundle_runs_in_an_environment_of_its_own(weights, tmp_path, small_demo_dataset):
    folder = tmp_path / "handed over"
    own = ("DATASETS.OWN.VAL_JSON", str(small_demo_dataset / "annotations/instances_val.json"))
    own += ("DATASETS.OWN.VAL_IMAGES", str(small_demo_dataset / "val"))
    evaluation = {"evaluate": True, "max_ap_loss": 5.0}
    export(weights, folder / "d.onnx", *own, part="detector", bundle=True, **evaluation)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}
    readme = (folder / "README.md").read_text()
    packages, command = re.search(r"pip install (.*)\n(.*)\n", readme).groups()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    clean = {"env": {}, "check": True, "cwd": folder}
    subprocess.run([python, "-m", "pip", "install", "-q", *packages.split()], **clean)
    shutil.copy(small_demo_dataset / "val" / "000001.jpg", folder / "photo.jpg")
    arguments = [*command.split()[1:], "0.2"]
    answer = subprocess.run([python, *arguments], capture_output=True, text=True, **clean)
    assert {line.split()[0] for line in answer.stdout.splitlines()} & {"disc", "crate", "tile"}
    assert (folder / "drawn.png").stat().st_size > 0
    assert set(packages.split()) == {"numpy", "pillow", "onnxruntime"}
    info = json.loads((folder / "info.json").read_text())
    assert info["classes"] == ["disc", "crate", "tile", "star"] and info["threshold"] == 0.0
    assert info["AP"].keys() == {"bbox", "segm"}
    assert torch.__version__.startswith(info["versions"]["torch"])
    assert info["pretrained"] == {"weights": None, "licence": None} and info["date"]


@pytest.mark.slow
def test_the_example_runs_torchscript_too(weights, tmp_path, small_demo_dataset):
    export(weights, tmp_path / "detector.ts")
    photo = small_demo_dataset / "val" / "000001.jpg"
    code = (
        "import sys; sys.modules['rope_vit_det'] = sys.modules['detectron2'] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "import run_detector; run_detector.main(*sys.argv[1:], threshold=0.2)"
    )
    command = ["-W", "ignore", "-c", code, tmp_path / "detector.ts", photo, tmp_path / "drawn.png"]
    answer = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    assert {line.split()[0] for line in answer.stdout.splitlines()} & {"disc", "crate", "tile"}
    assert (tmp_path / "drawn.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("raise ValueError('no\\nway')", "torch.onnx.export failed: ValueError no way; nothing"),
        ("os.abort()", "the process of torch.onnx.export ended with exit status -6"),
    ],
)
def test_an_exporter_that_fails_leaves_one_line_and_no_file(weights, tmp_path, fault, line):
    code = f"import os, sys, torch\ndef fail(*_, **__): {fault}\ntorch.onnx.export = fail\n"
    code += f"sys.path.insert(0, {str(ROOT / 'tools')!r})\nimport export_model\nexport_model.main()"
    files = (CONFIG, tmp_path / "new" / "b.onnx", "--weights", weights, "--bundle")
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *files], capture_output=True, text=True
    )
    assert answer.returncode == 1 and line in answer.stderr
    assert "Traceback" not in answer.stderr and answer.stderr.splitlines()[-1].startswith("error")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ap_of_the_exported_detector_beside_the_eager_one(
    weights, tmp_path, small_demo_dataset, capsys
):
    json_file = small_demo_dataset / "annotations" / "instances_val.json"
    small = (
        *("INPUT.MIN_SIZE_TEST", "192", "DATASETS.OWN.VAL_JSON", str(json_file)),
        *("DATASETS.OWN.VAL_IMAGES", str(small_demo_dataset / "val")),
    )
    export(weights, tmp_path / "d.ts", *small, evaluate=True, max_ap_loss=5.0)
    rows = capsys.readouterr().out.splitlines()
    eager, exported = (
        row.split("|")[2:] for row in rows if row.startswith(("| eager", "| exported"))
    )
    assert eager == exported
    with pytest.raises(RunError, match="more than --max-ap-loss -101"):
        export(weights, tmp_path / "b.pt2", *small, evaluate=True, max_ap_loss=-101.0)
    assert [path.name for path in tmp_path.iterdir()] == ["d.ts"]


def test_a_file_is_not_written_where_the_exported_model_differs():
    _, model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    image = check_images([], [(64, 96)], "RGB")[0]
    with torch.no_grad():
        found = find_instances(model, image, torch.tensor([64, 96]))
    same = {"pred_boxes": found.pred_boxes.tensor, "scores": found.scores}
    same |= {"pred_classes": found.pred_classes, "pred_masks": found.pred_masks}
    assert "100 detections" in compare_detections(model, lambda x, size: same, [image], 0.0, 32)
    for name, change in (("pred_boxes", 2.0), ("scores", 0.1), ("pred_masks", 0.1)):
        other = same | {name: same[name] + change}
        with pytest.raises(RunError, match="nothing was written"):
            compare_detections(model, lambda x, size, other=other: other, [image], 0.0, 32)
    # Where the limits are finer than float32, float64 is the judge.
    finest = dict.fromkeys(LIMITS, 1e-9)
    near = same | {"scores": torch.nextafter(found.scores, torch.ones(100))}
    arguments = ([image], 0.0, 32, finest)
    assert "compared with it in float64" in compare_detections(model, lambda *_: near, *arguments)
    far = same | {"scores": found.scores + 1e-4}
    with pytest.raises(RunError, match="float64, from which the eager one differs by boxes"):
        compare_detections(model, lambda *_: far, *arguments)
    fewer = {key: value[:50] for key, value in same.items()}
    with pytest.raises(RunError, match="nothing was written"):
        compare_detections(model, lambda x, size: fewer, [image], 0.0, 32)

    class Ones(nn.Module):
        def forward(self, x):
            return {"p3": torch.ones(2)}

    assert "p3 0.0e+00" in compare_features(Ones(), Ones(), [image[None]])
    for wrong in (1.01, float("nan")):
        with pytest.raises(RunError, match="p3"):
            compare_features(Ones(), lambda x, w=wrong: {"p3": torch.tensor([1, w])}, [image[None]])


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ("model.pth", {}, "suffix and --part say what is exported"),
        ("detector.pt2", {"part": "detector"}, "suffix and --part say what is exported"),
        ("b.onnx", {"bundle": True}, "name a new folder"),
        ("there.ts", {}, "is there already"),
        ("d.ts", {"images": ["none.jpg"]}, "none.jpg"),
        ("d.ts", {"weights": "none.pth"}, "none.pth"),
        ("d.ts", {"config_file": "none.yaml"}, "none.yaml"),
        ("d.ts", {"max_ap_loss": 0.5}, "--max-ap-loss is for --eval"),
        ("d.ts", {"opts": ["MODEL.DEVICE", "cuda"]}, "MODEL.DEVICE would have no effect"),
        ("d.ts", {"opts": ["MODEL.RETINANET.SCORE_THRESH_TEST", "0"]}, "--confidence-threshold"),
    ],
)
def test_wrong_inputs_are_named_and_nothing_is_written(
    weights, tmp_path, monkeypatch, output, options, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.ts").write_text("mine")
    with pytest.raises(InputError, match=reason):
        main.run(**{"config_file": CONFIG, "weights": weights, "output": output} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.ts"]
    assert (tmp_path / "there.ts").read_text() == "mine"


def test_windows_enlarge_the_multiple():
    for window, step in ((0, 32), (4, 64), (7, 224), (16, 256)):
        assert size_multiple(build("MODEL.ROPE_VIT.WINDOW_SIZE", str(window))[1]) == step

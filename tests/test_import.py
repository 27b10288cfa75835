"""What importing the package does, in fresh processes: with Detectron2, and where there is none."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
# Before all else: a process in which Detectron2 and its libraries are nowhere to be found.
WITHOUT_DETECTRON2 = """
import importlib.util, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("detectron2", "fvcore", "iopath")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("detectron2") is None
"""


def run(code, *arguments, without_detectron2=False):
    """What a fresh process prints that runs some code; nothing but that."""
    code = (WITHOUT_DETECTRON2 if without_detectron2 else "") + code
    answer = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


def test_the_network_its_weights_and_the_lower_rooms_need_no_detectron2(tmp_path, birder_file):
    path, net = birder_file("rope_vit_reg1_t16")
    code = """
import importlib, pkgutil
import rope_vit_det
rooms = ("layers", "models", "weights", "classification", "utils", "errors")
found = pkgutil.walk_packages(rope_vit_det.__path__, "rope_vit_det.", onerror=lambda name: None)
names = [module.name for module in found if module.name.split(".")[1] in rooms]
for name in names:
    importlib.import_module(name)
print(len(names))
from rope_vit_det import create_model, load_model
from rope_vit_det.classification import classify, embed, find_images
model, info = load_model(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
for name in rope_vit_det.__all__:
    try:
        getattr(rope_vit_det, name)
    except ModuleNotFoundError as error:
        assert f"rope_vit_det.{name} needs Detectron2" in str(error), error
        assert "rope-vit-det-install-detectron2" in str(error) and error.name == "detectron2"
        print(name)
"""
    imported, count, *refused = run(code, path, without_detectron2=True).split()
    assert int(imported) > 30
    assert int(count) == sum(parameter.numel() for parameter in net.parameters())
    assert {"Predictor", "RoPEViTPyramid", "create_backbone", "use_rope_vit"} <= set(refused)
    assert not {"RoPEViT", "bound_caches", "create_model", "load_model"} & set(refused)


def test_tools_that_need_no_detectron2(tmp_path, birder_file):
    image, backbone = tmp_path / "image.png", tmp_path / "backbone.pth"
    Image.new("RGB", (40, 30)).save(image)
    path, _ = birder_file("rope_vit_reg1_t16")
    commands = [
        ["analyze_model.py", "--network", "rope_vit_reg1_t16", "--size", "64"],
        ["classify.py", path, image, "--embeddings"],
        ["convert_weights.py", path, backbone],
    ]
    code = """
import json, os, runpy
_, tools, commands = sys.argv
for tool, *arguments in json.loads(commands):
    sys.argv = [os.path.join(tools, tool), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (tool, end.code)
"""
    answer = run(code, ROOT / "tools", json.dumps(commands, default=str), without_detectron2=True)
    assert "multiply-adds" in answer and "embedding_0" in answer and backbone.is_file()


REGISTERED = """
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.file_io import PathManager
from rope_vit_det.errors import InputError
found = [name for name, _ in BACKBONE_REGISTRY if "rope_vit" in name]
assert len(found) == 5, found
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
assert "FastRPN" in PROPOSAL_GENERATOR_REGISTRY
try:
    PathManager.get_local_path("birder:/nowhere.pt")
except InputError as error:
    assert "/nowhere.pt" in str(error)
else:
    raise AssertionError("no handler took birder:")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import rope_vit_det.heads",
        pytest.param("import rope_vit_det", marks=pytest.mark.slow),
        pytest.param("import rope_vit_det, detectron2.engine", marks=pytest.mark.slow),
        "import detectron2.modeling, rope_vit_det",
        pytest.param("from rope_vit_det import RoPEViTPyramid", marks=pytest.mark.slow),
        pytest.param("import rope_vit_det.data", marks=pytest.mark.slow),
    ],
)
def test_the_backbones_register_whichever_is_imported_first(imports):
    run(imports + REGISTERED)


def test_importing_is_all_that_it_does():
    code = """
import json, os, sys
before = dict(os.environ)
import rope_vit_det
assert dict(os.environ) == before
light = [name for name in ("torch", "detectron2", "cv2") if name in sys.modules]
from detectron2.modeling import BACKBONE_REGISTRY
rooms = sorted({n.split(".")[1] for n in sys.modules if n.startswith("rope_vit_det.")})
import rope_vit_det.engine.main
from detectron2.data import DatasetCatalog
demo = [name for name in DatasetCatalog.list() if "rope_vit" in name]
rope_vit_det.data.register_demo_dataset(), rope_vit_det.data.register_demo_dataset()
then = [name for name in DatasetCatalog.list() if "rope_vit" in name]
print(json.dumps([light, rooms, demo, then]))
"""
    light, rooms, demo, then = json.loads(run(code))
    assert light == []
    assert not {"engine", "data", "evaluation", "prediction", "checkpoint"} & set(rooms)
    assert demo == [] and then == ["rope_vit_det_demo_train", "rope_vit_det_demo_val"]


def test_a_detectron2_of_any_loader_is_registered_with(tmp_path):
    with zipfile.ZipFile(tmp_path / "libraries.zip", "w") as archive:
        archive.writestr("detectron2/__init__.py", "")
        archive.writestr("detectron2/modeling.py", "print('modeling')")
        archive.writestr("ours.py", "print('registered')")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import rope_vit_det
rope_vit_det._REGISTERED_BEHIND["detectron2.modeling"] = "ours"
import detectron2.modeling
"""
    assert run(code, tmp_path / "libraries.zip").split() == ["modeling", "registered"]

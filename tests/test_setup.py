"""What an installation asks for, and what it leaves alone."""

import ast
import re
import runpy
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def declared(monkeypatch):
    """The arguments that setup.py gives to setuptools, run with some Python."""

    def run(python) -> dict:
        arguments = {}
        with monkeypatch.context() as patch:
            patch.setattr("setuptools.setup", lambda **kwargs: arguments.update(kwargs))
            patch.setattr(sys, "executable", str(python))
            runpy.run_path(str(ROOT / "setup.py"))
        return arguments

    return run


def _names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_opencv_is_asked_for_only_where_there_is_none(declared, tmp_path):
    venv.create(tmp_path / "empty")
    there = _names(declared(sys.executable)["install_requires"])
    empty = _names(declared(tmp_path / "empty" / "bin" / "python")["install_requires"])
    assert empty - there == {"opencv-python"}


def test_what_the_package_imports_is_declared(declared, tmp_path):
    venv.create(tmp_path / "empty")
    names = _names(declared(tmp_path / "empty" / "bin" / "python")["install_requires"])
    assert "detectron2" not in names
    imported = set()
    for path in (ROOT / "rope_vit_det").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    third_party = imported - sys.stdlib_module_names - {"rope_vit_det", "detectron2"}
    third_party -= {"onnx", "onnxruntime"}  # of the extra "export"
    third_party -= {"omegaconf"}  # of Detectron2's LazyConfig, which asks for it
    # Used where they are installed.
    third_party -= {"faster_coco_eval", "lvis", "panopticapi", "sahi", "supervision"}
    distributions = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml"}
    assert {distributions.get(name, name) for name in third_party} <= names
    # The design card's own list.
    assert names >= {"torch", "torchvision", "fvcore", "pycocotools", "opencv-python"}


def test_the_constraints_pin_what_is_declared_and_what_is_installed(declared, tmp_path):
    venv.create(tmp_path / "empty")
    arguments = declared(tmp_path / "empty" / "bin" / "python")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    for name in _names([*arguments["install_requires"], *arguments["extras_require"]["test"]]):
        assert name in pins, name
    for name in ("torch", "torchvision", "numpy", "birder", "timm"):
        assert metadata.version(name).split("+")[0] == pins[name], name


def test_layers_and_models_do_not_need_detectron2():
    # The package's own __init__ registers backbones, so it is stood in for.
    ask = f"""
import sys, types
sys.modules["detectron2"] = None
sys.modules["rope_vit_det"] = package = types.ModuleType("rope_vit_det")
package.__path__ = [{str(ROOT / "rope_vit_det")!r}]
import rope_vit_det.models, rope_vit_det.layers.attention
"""
    subprocess.run([sys.executable, "-c", ask], check=True)

"""What an installation asks for, and what it leaves alone."""

import ast
import itertools
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from lowest_requirements import lowest_requirements

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_every_requirement_has_a_lower_bound(project):
    extras = list(itertools.chain(*project["optional-dependencies"].values()))
    for line in [*project["dependencies"], *extras]:
        assert line.startswith("rope-vit-det[") or re.fullmatch(
            r"[\w-]+[>=]=[\w.]+(,!=[\w.*]+)?", line
        ), line
    assert "opencv-python==4.10.0.84" in lowest_requirements()


def test_what_the_package_imports_is_declared(project):
    names = _names(project["dependencies"])
    assert "detectron2" not in names
    imported = set()
    for path in (ROOT / "rope_vit_det").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    third_party = imported - sys.stdlib_module_names - {"rope_vit_det", "detectron2"}
    third_party -= {"onnx", "onnxruntime", "onnxscript"}  # of the extra "export"
    third_party -= {"nncf", "openvino"}  # of the extra "openvino"
    third_party -= {"omegaconf"}  # of Detectron2's LazyConfig, which asks for it
    # Used where they are installed.
    third_party -= {"lvis", "panopticapi", "supervision"}
    third_party -= {"cityscapesscripts", "timm"}
    distributions = {
        "cv2": "opencv-python",
        "faster_coco_eval": "faster-coco-eval",
        "PIL": "pillow",
        "yaml": "pyyaml",
    }
    assert {distributions.get(name, name) for name in third_party} <= names
    # The design card's own list.
    assert names >= {"torch", "torchvision", "fvcore", "pycocotools", "opencv-python"}


def test_the_constraints_pin_what_is_declared_and_what_is_installed(project):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    extras = list(itertools.chain(*project["optional-dependencies"].values()))
    for name in _names([*project["dependencies"], *extras]) - {"rope-vit-det"}:
        assert name.lower() in pins, name
    if metadata.version("torch").split("+")[0] != pins["torch"]:
        pytest.skip("with another torch, this environment is not of these constraints")
    for name in ("torchvision", "numpy", "birder", "timm"):
        assert metadata.version(name).split("+")[0] == pins[name], name

"""The package as pip installs it, away from its sources."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# For developers, in the sources alone.
NOT_INSTALLED = {"aerial_trees", "benchmark", "benchmark_memory", "high_resolution_study"}


@pytest.fixture
def commands():
    """What pyproject.toml declares: each command's module and function."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]


def test_every_tool_has_a_command(commands):
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - NOT_INSTALLED
    assert sorted(commands.values()) == sorted(f"rope_vit_det_tools.{t}:main" for t in tools)
    for tool in tools:
        assert "\ndef main() -> None:\n" in (ROOT / "tools" / f"{tool}.py").read_text("utf-8")


def without_sources():
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _requirements(metadata: str) -> list[str]:
    return [line for line in metadata.splitlines() if line.startswith("Requires-Dist: opencv")]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "-q", *arguments]
    subprocess.run(command, check=True, timeout=300, env=without_sources())


def _copy_sources(source):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rope_vit_det", "configs", "examples", "tools"):
        shutil.copytree(ROOT / name, source / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")  # building writes into it
    _copy_sources(source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_configs_examples_and_tools_and_passes_twine(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name) for name in names if name.endswith("/METADATA"))
    packages = {"tools": "rope_vit_det_tools"}
    packages |= {folder: f"rope_vit_det/{folder}" for folder in ("configs", "examples")}
    for folder, package in packages.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".yaml", ".py"):
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".pyc")]
    # On whatever machine: this one has a cv2.
    assert _requirements(metadata.decode()) == ["Requires-Dist: opencv-python>=4.10.0.84"]
    assert "rope_vit_det/py.typed" in names
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel, which borrows all it needs from this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    pip("--python", root / "bin" / "python", "install", "--no-deps", wheel)
    (site,) = root.glob("lib/python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")

    def run(name, *arguments):
        return subprocess.run(
            [root / "bin" / name, *arguments],
            capture_output=True,
            text=True,
            cwd=root,
            env=without_sources(),
            timeout=300,
        )

    run.site = site
    return run


@pytest.mark.slow
@pytest.mark.parametrize("cv2", ["imread = None", "", None])
def test_an_editable_install_leaves_an_importable_cv2_alone(cv2, tmp_path):
    source, root = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    _copy_sources(source)
    venv.create(root, with_pip=True)
    python = root / "bin" / "python"
    (site,) = root.glob("lib/python*/site-packages")
    if cv2 is not None:
        (site / "cv2.py").write_text(cv2)
    command = [python, "-m", "pip", "-q", "install", "--no-deps", "-e", source]
    subprocess.run(command, check=True, timeout=300, env=without_sources())
    (metadata,) = site.glob("rope_vit_det-*.dist-info/METADATA")
    asked = _requirements(metadata.read_text("utf-8"))
    assert bool(asked) == (cv2 != "imread = None")


@pytest.mark.slow
def test_it_can_be_imported_from_anywhere(installed):
    answer = installed("python", "-c", "import rope_vit_det; print(rope_vit_det.__file__)")
    assert Path(answer.stdout.strip()).is_relative_to(installed.site), answer.stderr


@pytest.mark.slow
def test_every_command_runs(installed, commands):
    for command in commands:
        answer = installed(command, "--help")
        assert answer.returncode == 0 and command in answer.stdout, answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("rope-vit-det-train", "configs/demo.yaml"),
        ("rope-vit-det-train", "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_1x.yaml"),
        ("rope-vit-det-train-lazy", "COCO-Detection/fcos_rope_vit_reg4_b14_1x.py"),
    ],
)
def test_configs_are_found_by_name(installed, command, config):
    # As far as the check of the weights, which comes after the config.
    lazy = config.endswith(".py")
    weights = ["train.init_checkpoint=none.pth"] if lazy else ["MODEL.WEIGHTS", "none.pth"]
    answer = installed(command, "--config-file", config, *weights)
    assert answer.returncode == 2 and "none.pth: no such file" in answer.stderr, answer.stderr


@pytest.mark.slow
def test_the_licence_of_detectron2_can_be_written_away_from_the_sources(installed):
    ask = "from rope_vit_det_tools.install_detectron2 import read_license as r; print(r().decode())"
    answer = installed("python", "-c", ask)
    assert answer.stdout.rstrip("\n") == (ROOT / "LICENSE").read_text().rstrip("\n"), answer.stderr


@pytest.mark.slow
def test_pip_installs_it_into_a_clean_environment(tmp_path):
    """With all it needs, from the index: gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    for command in (
        ("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT),
        (tmp_path / "env" / "bin" / "rope-vit-det-install-detectron2",),
        (tmp_path / "env" / "bin" / "rope-vit-det-train", "--help"),
    ):
        program = [python] if command[0] == "-m" else []
        subprocess.run([*program, *command], check=True, cwd=tmp_path, timeout=1800)

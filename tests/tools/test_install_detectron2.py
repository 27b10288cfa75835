"""The installer: what it takes out of the wheel, and one clear line for everything that fails."""

import csv
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
WHEEL = "labgym-3.1.2-py3-none-any.whl"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def python(tmp_path, empty_environment):
    """The Python of an empty environment that says it has a torch."""
    shutil.copytree(empty_environment, tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    _pretend_torch(python, "2.8.0")
    (_site(python) / "cv2.py").write_text("imread = None\n")
    return python


def _site(python: Path) -> Path:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", ask], text=True).strip())


def _pretend_torch(python: Path, version: str) -> None:
    for old in _site(python).glob("torch-*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    info = _site(python) / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def _fake_labgym(folder: Path) -> Path:
    """A wheel laid out as labgym's."""
    folder.mkdir()
    files = {
        "LabGym/__init__.py": "not to be taken",
        "LabGym/detector.py": "import LabGym.detectron2",
        "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
        "LabGym/detectron2/modeling/__init__.py": "from LabGym.detectron2 import __version__\n",
        "LabGym/detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
        "LabGym/detectron2/model_zoo/model_zoo.py": "import os\nimport pkg_resources\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n    return cfg_file\n",
        "LabGym/detectron2/model_zoo/configs/a.yaml": "LabGym.detectron2: kept as it is\n",
        "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: labgym\nVersion: 3.1.2\n",
        "labgym-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        "labgym-3.1.2.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / WHEEL


def _run(python, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [python, SCRIPT, *arguments], capture_output=True, text=True, env=env | environment
    )


def _assert_one_line(answer, python, *parts):
    assert answer.returncode != 0
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert answer.stderr.startswith("error: ")
    for part in parts:
        assert part in answer.stderr
    assert not list(_site(python).glob("detectron2*"))


def test_only_detectron2_is_taken_and_renamed_back(installer, tmp_path):
    target = tmp_path / f"detectron2-{installer.VERSION}-py3-none-any.whl"
    installer.build_wheel(_fake_labgym(tmp_path / "in"), target)
    with zipfile.ZipFile(target) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = installer.DIST_INFO
    assert {name for name in files if not name.startswith(info)} == {
        "detectron2/__init__.py",
        "detectron2/modeling/__init__.py",
        "detectron2/model_zoo/__init__.py",
        "detectron2/model_zoo/model_zoo.py",
        "detectron2/model_zoo/configs/a.yaml",
    }
    assert files["detectron2/modeling/__init__.py"] == b"from detectron2 import __version__\n"
    assert b"Apache License" in files[f"{info}/LICENSE"]
    origin = files[f"{info}/ORIGIN.txt"].decode()
    for part in ("Copyright (c) Facebook", "labgym==3.1.2", installer.WHEEL_SHA256, "Changed"):
        assert part in origin
    recorded = {
        row[0]: row[1:] for row in csv.reader(io.StringIO(files[f"{info}/RECORD"].decode()))
    }
    assert set(recorded) == set(files)
    for name, (digest, size) in recorded.items():
        if digest:
            import base64

            own = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=")
            assert (digest, int(size)) == (f"sha256={own.decode()}", len(files[name]))


def test_the_model_zoo_finds_its_files_without_pkg_resources(installer, tmp_path):
    target = tmp_path / "built.whl"
    installer.build_wheel(_fake_labgym(tmp_path / "in"), target)
    with zipfile.ZipFile(target) as archive:
        archive.extractall(tmp_path / "site")
        assert "importlib.resources" in archive.read(f"{installer.DIST_INFO}/ORIGIN.txt").decode()
        assert b"setuptools" not in archive.read(f"{installer.DIST_INFO}/METADATA")
    ask = (
        "import sys; sys.modules['pkg_resources'] = None\n"
        "from detectron2 import model_zoo; print(open(model_zoo.get_config_file('a.yaml')).read())"
    )
    answer = subprocess.check_output([sys.executable, "-c", ask], text=True, cwd=tmp_path / "site")
    assert "kept as it is" in answer


def _own_detectron2(python, model_zoo=""):
    package = _site(python) / "detectron2"
    for room in ("modeling", "model_zoo"):
        (package / room).mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.7.mine"\n')
    (package / "modeling" / "__init__.py").write_text("")
    (package / "model_zoo" / "__init__.py").write_text(model_zoo)


def test_one_that_needs_pkg_resources_gets_a_line(python):
    _own_detectron2(python, "raise ModuleNotFoundError(\"No module named 'pkg_resources'\")\n")
    answer = _run(python)
    assert answer.returncode != 0 and len(answer.stderr.strip().splitlines()) == 1
    assert "pip install 'setuptools<81'" in answer.stderr


@pytest.mark.parametrize(
    ("cv2", "remedy"),
    [
        ("raise ImportError('libGL.so.1: cannot open shared object file')", "apt-get install"),
        ("", "pip uninstall opencv-python"),
    ],
)
def test_a_cv2_that_cannot_be_imported_gets_a_line(python, cv2, remedy):
    _own_detectron2(python)
    (_site(python) / "cv2.py").write_text(f"{cv2}\n")
    answer = _run(python)
    assert answer.returncode != 0 and len(answer.stderr.strip().splitlines()) == 1
    assert answer.stderr.startswith("error: import cv2: ") and remedy in answer.stderr


def test_an_importable_detectron2_is_respected(python):
    _own_detectron2(python)
    answer = _run(python, PIP_NO_INDEX="1")
    assert answer.returncode == 0, answer.stderr
    assert "0.7.mine" in answer.stdout and "left as it is" in answer.stdout


def test_a_broken_detectron2_is_reported_and_left(python):
    package = _site(python) / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module\n")
    answer = _run(python)
    assert answer.returncode != 0
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "no_such_module" in answer.stderr and "pip uninstall detectron2" in answer.stderr
    assert (package / "__init__.py").exists()


def test_without_a_network(python):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    _assert_one_line(_run(python, **nowhere), python, "labgym==3.1.2", "is the network reachable?")


def test_an_index_without_the_wheel(python):
    answer = _run(python, PIP_NO_INDEX="1")
    _assert_one_line(answer, python, "labgym==3.1.2", "Could not find a version")
    assert "network" not in answer.stderr


def test_a_wheel_with_another_hash(python, tmp_path):
    wheel = _fake_labgym(tmp_path / "links")
    answer = _run(python, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    _assert_one_line(answer, python, WHEEL, found, "sha256")


@pytest.mark.parametrize("version", ["2.7.1", "1.13.0+cu117"])
def test_an_old_torch(python, version):
    _pretend_torch(python, version)
    _assert_one_line(_run(python), python, f"torch {version}", "2.8 or newer")


def test_without_torch(python):
    for info in _site(python).glob("torch-*.dist-info"):
        (info / "METADATA").unlink()
        info.rmdir()
    _assert_one_line(_run(python), python, "torch is not installed", "2.8 or newer")


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_an_unsupported_python(installer, monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    with pytest.raises(installer.InstallError, match=rf"Python 3\.{version[1]}; supported: 3.11"):
        installer.check_environment()


def test_upstream_without_git(python):
    answer = _run(python, "--source", "upstream", PATH="/nonexistent")
    _assert_one_line(answer, python, "git")


def test_upstream_without_a_network(python):
    nowhere = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "url.http://127.0.0.1:9/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://",
    }
    answer = _run(python, "--source", "upstream", **nowhere)
    _assert_one_line(answer, python, "network")


@pytest.mark.slow
def test_upstream_is_built_at_its_commit(python, tmp_path):
    """From a repository that stands in for GitHub's, whose main has moved on."""
    repository = tmp_path / "upstream"
    (repository / "detectron2" / "modeling").mkdir(parents=True)
    (repository / "detectron2" / "modeling" / "__init__.py").touch()
    (repository / "detectron2" / "model_zoo").mkdir()
    (repository / "detectron2" / "model_zoo" / "__init__.py").touch()
    (repository / "setup.py").write_text(
        "from setuptools import find_packages, setup\n"
        "setup(name='detectron2', version='0.6', packages=find_packages())\n"
    )

    def git(*arguments):
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = ["git", "-C", repository, *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for version in ("pinned", "later"):
        (repository / "detectron2" / "__init__.py").write_text(f"__version__ = '{version}'\n")
        git("add", ".")
        git("commit", "-q", "-m", version)
    source = SCRIPT.read_text()
    pinned = {"UPSTREAM": repository.as_uri(), "UPSTREAM_COMMIT": git("rev-parse", "HEAD~1")}
    for name, value in pinned.items():
        source, found = re.subn(f'^{name} = "[^"]*"', f'{name} = "{value}"', source, flags=re.M)
        assert found == 1
    script = tmp_path / "install_detectron2.py"
    script.write_text(source)
    command = [python, script, "--source", "upstream"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    ask = (
        "import detectron2, importlib.metadata\n"
        "print(detectron2.__version__, importlib.metadata.version('detectron2'))"
    )
    told = subprocess.check_output([python, "-c", ask], text=True, cwd=tmp_path / "env")
    assert told.split() == ["pinned", "0.6"]


@pytest.mark.slow
def test_the_real_wheel_gives_a_detectron2_that_imports(installer, tmp_path):
    installer._pip("no network", "download", "--no-deps", "--python-version", "3.10",
                   "--only-binary=:all:", "--dest", str(tmp_path), installer.WHEEL)  # fmt: skip
    (source,) = tmp_path.glob("*.whl")
    assert hashlib.sha256(source.read_bytes()).hexdigest() == installer.WHEEL_SHA256
    target = tmp_path / "built.whl"
    installer.build_wheel(source, target)
    ask = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.modules['pkg_resources'] = None\n"
        "from detectron2 import model_zoo, __file__\n"
        "import detectron2.engine, detectron2.evaluation, detectron2.export\n"
        "print(__file__, model_zoo.get_config_file("
        "'COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml'))"
    )
    with zipfile.ZipFile(target) as archive:
        archive.extractall(tmp_path / "site")
        assert not any("LabGym" in name for name in archive.namelist())
    told = subprocess.check_output([sys.executable, "-W", "ignore", "-c", ask], text=True)
    assert told.count(str(tmp_path / "site")) == 2

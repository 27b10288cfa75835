#!/usr/bin/env python3
"""Wheels for a machine with a GPU and no network: `make gpu-wheels` collects them, where PyPI is.

What such a machine is taken to have is `ASSUMED`; --has FILE says it exactly, with what `pip list
--format=freeze` prints there. What does not fit is named. --install FOLDER sets up an environment
from them, by the standard library alone, which sees all that the interpreter at hand has.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu-wheels"
LIMIT = 60 * 2**20
# Large, and in every image for PyTorch: together twice the limit.
ASSUMED = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib"),
    "opencv-python-headless",
)
# By importance: the first are needed, of the others each is left out, by name, that does not fit.
NEEDED = ("detectron2", "pytest", "pytest-xdist", "hypothesis", "setuptools>=77")
WISHED = ("timm", "birder", "faster-coco-eval", "supervision", "sahi", "onnx", "onnxscript",
          "onnxruntime", "openvino")  # fmt: skip
# Asked for by these, but not imported by what runs here; of polars there is a stand-in.
SPARED = {"polars", "polars-runtime-32", "pyarrow", "black", "grpcio", "tensorboard-data-server",
          "av", "torchinfo", "torchmetrics", "cryptography", "opencv-python"}  # fmt: skip
# PyPI has their sources alone; they are pure Python.
SOURCES = {"fvcore", "iopath", "antlr4-python3-runtime"}
PLATFORMS = ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in (17, 24, 27, 28)))


def collect(python: str, has: dict[str, str]) -> str:
    """Fills `WHEELS`.

    Args:
        python: version of the interpreter there, such as 3.12.
        has: names of what it has, and versions, "" where these are not known.

    Returns:
        What was collected and what was not, in lines.
    """
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = {_name(each): each for extra in extras.values() for each in extra}
    needed = [*project["dependencies"], *NEEDED]
    lines, left_out, size, seen = [], [], 0, set(has)
    for root in (*needed, *(bounds.get(name, name) for name in WISHED)):
        new = _closure(root, python, seen, has)
        with TemporaryDirectory() as folder:
            _download([_name(each) for each in new], python, Path(folder))
            files = list(Path(folder).iterdir())
            more = sum(file.stat().st_size for file in files)
            if size + more > LIMIT:
                if root in needed:
                    raise SystemExit(f"error: {root} does not fit {LIMIT >> 20} MiB")
                left_out.append(f"{_name(root)} ({more / 2**20:.0f} MiB)")
                continue
            for file in files:
                shutil.move(file, WHEELS)
        size += more
        seen |= {_name(each) for each in new}
        lines += new
    absent = f"not in it, for want of room: {', '.join(left_out) or 'nothing'}"
    (WHEELS / "requirements.txt").write_text("\n".join([*lines, f"# {absent}"]) + "\n")
    there = ", ".join(sorted(has)) if len(has) < 20 else f"{len(has)} packages"
    return (
        f"{WHEELS.name}/: {len(lines)} wheels, {size / 2**20:.1f} MiB, for Python {python}\n"
        f"{absent}\ntaken to be there: {there}"
    )


def _closure(root: str, python: str, seen: set[str], has: dict[str, str]) -> list[str]:
    """What `root` needs, itself included, beyond what was seen; by what is installed here."""
    from packaging.requirements import Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}

    def walk(requirement: str, extras: set[str]) -> None:
        parsed = Requirement(requirement)
        name = _name(parsed.name)
        marker = parsed.marker
        if marker and not any(marker.evaluate(environment | {"extra": e}) for e in extras or {""}):
            return
        old = requirement == root and has.get(name) and has[name] not in parsed.specifier
        if (name in seen and not old) or name in SPARED or name in found:
            return
        found[name] = f"{parsed.name}{parsed.specifier}" if requirement == root else name
        for each in metadata.distribution(name).requires or ():
            walk(each, parsed.extras)

    walk(root, set())
    return list(found.values())


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def _download(packages: list[str], python: str, folder: Path) -> None:
    """The wheels of packages in the versions that are installed here."""
    pins = {name: f"{name}=={metadata.version(name)}" for name in packages}
    if pins.pop("detectron2", None):
        path = ROOT / "tools" / "install_detectron2.py"
        spec = importlib.util.spec_from_file_location("install_detectron2", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        with TemporaryDirectory() as whole:
            shutil.move(tool.wheel_from_pypi(Path(whole)), folder)
    sources = [pins.pop(name) for name in SOURCES & pins.keys()]
    if sources:
        _pip("wheel", "--no-deps", "--wheel-dir", folder, *sources)
    if pins:
        platforms = [f"--platform={each}_x86_64" for each in PLATFORMS]
        only = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
        _pip("download", "--no-deps", "--dest", folder, *only, *platforms, *pins.values())


def _pip(command: str, *arguments: object, python: object = sys.executable, **more: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"} | more
    pip = [python, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments]
    answer = subprocess.run(
        [str(each) for each in pip], env=environment, capture_output=True, text=True
    )
    if answer.returncode:
        lines = [
            line for line in answer.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        raise SystemExit(f"error: pip {command}: {(lines or ['no reason given'])[-1]}")


def install(folder: Path) -> str:
    """An environment with the wheels, and with what this interpreter has.

    Returns:
        What is not in it, in lines.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(ask, text=True).strip())
    # Behind the environment's own. An environment of an environment would see the outermost alone.
    here = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    seen = [path for path in here if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    (site / "interpreter_at_hand.pth").write_text("\n".join(lines) + "\n")
    offline = ("--no-index", "--find-links", WHEELS, "--no-deps")
    _pip("install", *offline, "-r", WHEELS / "requirements.txt", python=python, PIP_FIND_LINKS="")
    _pip("install", *offline, "--no-build-isolation", "-e", ROOT, python=python, PIP_FIND_LINKS="")
    ask = [str(python), "-W", "ignore", "-c", "import cv2, torch, torchvision; cv2.imread"]
    answer = subprocess.run(ask, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"error: {answer.stderr.strip().splitlines()[-1]}")
    return (WHEELS / "requirements.txt").read_text().splitlines()[-1].removeprefix("# ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="there (default: %(default)s)")
    parser.add_argument("--has", type=Path, help="what pip list --format=freeze prints there")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="sets an environment up")
    args = parser.parse_args()
    if args.install:
        print(install(args.install))
        return
    there = args.has.read_text().split() if args.has else ASSUMED
    print(collect(args.python, {_name(each): each.partition("==")[2] for each in there}))


if __name__ == "__main__":
    main()

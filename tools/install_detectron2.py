#!/usr/bin/env python3
"""Installs Detectron2, which is not on PyPI, unless one can be imported already.

From PyPI it comes as a part of the wheel of labgym, which carries Detectron2 0.6 whole and in pure
Python; only that part is taken. The wheel as a whole is under the GPL-3.0, Detectron2 in it is
Meta's and under the Apache License 2.0.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

PYTHONS = ((3, 11), (3, 13))
MIN_TORCH = (2, 8)

WHEEL = "labgym==3.1.2"
WHEEL_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
WHEEL_FOLDER = "LabGym/"
VERSION = "0.6+labgym3.1.2"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
# What Detectron2's own setup.py asks for.
REQUIREMENTS = (
    "Pillow>=7.1",
    "black",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<=0.1.10",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)
ORIGIN = f"""\
Detectron2, https://github.com/facebookresearch/detectron2
Copyright (c) Facebook, Inc. and its affiliates (now Meta Platforms, Inc.).
Licensed under the Apache License, Version 2.0; see LICENSE beside this file.

Origin: the folder LabGym/detectron2 of the wheel {WHEEL}, sha256
{WHEEL_SHA256}.
Nothing else of that wheel is here; the wheel as a whole is under the GPL-3.0.

Changed in that wheel, by LabGym's authors: absolute imports of detectron2 became imports of
LabGym.detectron2; the C++ and CUDA extension (detectron2._C) is left out.
Changed here, by tools/install_detectron2.py of rope-vit-det: the imports are renamed back, and
detectron2/model_zoo/model_zoo.py finds its files by importlib.resources, not by pkg_resources.
"""
# In detectron2/model_zoo/model_zoo.py: setuptools has no pkg_resources since version 81.
MODEL_ZOO = {
    b"import pkg_resources\n": b"import importlib.resources\n",
    b'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ': b"str(\n"
    b'        importlib.resources.files("detectron2.model_zoo") / ',
}

UPSTREAM = "https://github.com/facebookresearch/detectron2"
UPSTREAM_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main on 2026-06-06
# How pip and git tell that no connection came about.
NO_CONNECTION = re.compile(
    r"NewConnectionError|Max retries exceeded|[Tt]imed out|Timeout|ProxyError|"
    r"[Cc]onnection (refused|reset|broken|aborted)|Network is unreachable|"
    r"[Nn]ame or service not known|[Nn]ame resolution|Could not resolve|Failed to connect|"
    r"Could(n't| not) connect"
)


class InstallError(Exception):
    """Why nothing was installed, in a line."""


def check_environment() -> None:
    """Checks that Python and torch are ones that Detectron2 is known to run with.

    Raises:
        InstallError: they are not.
    """
    low, high = PYTHONS
    if not low <= sys.version_info[:2] <= high:
        raise InstallError(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}; supported: "
            f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        )
    wanted = ".".join(map(str, MIN_TORCH))
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise InstallError(
            f"torch is not installed; supported: {wanted} or newer, with the torchvision that "
            "belongs to it: pip install torch torchvision"
        ) from None
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < MIN_TORCH:
        raise InstallError(f"this is torch {version}; supported: {wanted} or newer")


def find_detectron2() -> str | None:
    """Version and place of the Detectron2 that can be imported here, if there is one.

    Raises:
        InstallError: there is one, but its import fails.
    """
    ask = (
        "import importlib.util as u, sys\n"
        "if u.find_spec('detectron2') is None: sys.exit(3)\n"
        "import detectron2, detectron2.modeling, detectron2.model_zoo\n"
        "print(detectron2.__version__, 'in', *detectron2.__path__)"
    )
    # Not from here: a folder named detectron2 beside us is not an installation.
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True, cwd=folder
        )
    if answer.returncode == 3:
        return None
    if "No module named 'pkg_resources'" in answer.stderr:
        raise InstallError(
            "the Detectron2 that is installed needs pkg_resources, which setuptools has no more: "
            "pip install 'setuptools<81'"
        )
    if answer.returncode != 0:
        raise InstallError(
            f"the Detectron2 that is installed fails to import ({_last_line(answer.stderr)}); "
            "repair it, or take it out: pip uninstall detectron2"
        )
    return answer.stdout.strip().splitlines()[-1]


def check_opencv() -> None:
    """Checks that OpenCV, which Detectron2 draws with, can be imported.

    Raises:
        InstallError: it cannot, with what to do.
    """
    ask = [sys.executable, "-c", "import cv2; cv2.imread"]
    answer = subprocess.run(ask, capture_output=True, text=True)
    if answer.returncode != 0:
        reason = _last_line(answer.stderr)
        system = ".so" in reason  # a library of the system's
        remedy = "apt-get install -y libgl1 libglib2.0-0" if system else (
            "pip uninstall opencv-python opencv-python-headless, then pip install one of the two"
        )  # fmt: skip
        raise InstallError(f"import cv2: {reason}; run: {remedy}")


def wheel_from_pypi(folder: Path) -> Path:
    """Takes Detectron2 out of labgym's wheel, as a wheel of that name.

    Args:
        folder: for the wheels, empty.

    Raises:
        InstallError: no network, another file than expected, or pip's own reason.
    """
    _pip(
        f"cannot download {WHEEL}",
        *("download", "--no-deps", "--python-version", "3.10", "--only-binary=:all:"),
        *("--dest", str(folder), WHEEL),
    )
    (downloaded,) = folder.glob("*.whl")
    found = hashlib.sha256(downloaded.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise InstallError(
            f"{downloaded.name} has sha256 {found}, expected {WHEEL_SHA256}; it is not the file "
            "that was checked, and not used"
        )
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    build_wheel(downloaded, wheel)
    return wheel


def install_from_upstream() -> None:
    """Builds and installs upstream's main at a fixed commit.

    Raises:
        InstallError: no git, no network, or pip's own reason.
    """
    try:
        subprocess.run(["git", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise InstallError("--source upstream needs git; install it first") from None
    failure = f"cannot install {UPSTREAM} at {UPSTREAM_COMMIT[:10]}"
    # Its setup.py imports torch, which an isolated build would not have. A setuptools that builds
    # wheels by itself must be there before; many an environment has an older one, or none.
    _pip(failure, "install", "setuptools>=70.1")
    _pip(failure, "install", "--no-build-isolation", f"git+{UPSTREAM}@{UPSTREAM_COMMIT}")


def build_wheel(source: Path, target: Path) -> None:
    """Writes a wheel of the distribution detectron2 from labgym's."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.startswith(f"{WHEEL_FOLDER}detectron2/") and not name.endswith("/"):
                content = archive.read(name)
                if name.endswith(".py"):
                    content = content.replace(b"LabGym.detectron2", b"detectron2")
                if name.endswith("model_zoo/model_zoo.py"):
                    for old, new in MODEL_ZOO.items():
                        content = content.replace(old, new)
                files[name.removeprefix(WHEEL_FOLDER)] = content
    fields = [
        ("Metadata-Version", "2.1"),
        ("Name", "detectron2"),
        ("Version", VERSION),
        ("Summary", "Detectron2 0.6, pure Python, taken out of labgym's wheel; see ORIGIN.txt"),
        ("License", "Apache-2.0"),
        *(("Requires-Dist", requirement) for requirement in REQUIREMENTS),
    ]
    files |= {
        f"{DIST_INFO}/METADATA": "".join(f"{k}: {v}\n" for k, v in fields).encode(),
        f"{DIST_INFO}/WHEEL": b"Wheel-Version: 1.0\nGenerator: rope-vit-det\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
        f"{DIST_INFO}/LICENSE": read_license(),
        f"{DIST_INFO}/ORIGIN.txt": ORIGIN.encode(),
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        rows.writerow((name, f"sha256={digest.decode()}", len(content)))
    rows.writerow((f"{DIST_INFO}/RECORD", "", ""))
    files[f"{DIST_INFO}/RECORD"] = record.getvalue().encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def read_license() -> bytes:
    """The Apache License 2.0, which is ours and Detectron2's."""
    here = Path(__file__).resolve().parents[1] / "LICENSE"
    if here.is_file():
        return here.read_bytes()
    own = metadata.distribution("rope-vit-det")  # installed, without its sources
    (path,) = (file for file in own.files or () if file.name == "LICENSE")
    return path.read_binary()


def _pip(failure: str, command: str, *arguments: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[0].removeprefix("ERROR:").strip() if errors else _last_line(answer.stderr)
        hint = " (is the network reachable?)" if NO_CONNECTION.search(answer.stderr) else ""
        raise InstallError(f"{failure}: {reason}{hint}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source",
        choices=("pypi", "upstream"),
        default="pypi",
        help="pypi: Detectron2 0.6 out of labgym's wheel; upstream: git, at the commit "
        f"{UPSTREAM_COMMIT[:10]} (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        there = find_detectron2()
        if there:
            print(f"Detectron2 {there}: left as it is")
        else:
            check_environment()
            if args.source == "upstream":
                install_from_upstream()
            else:
                with tempfile.TemporaryDirectory() as folder:
                    _pip("cannot install Detectron2", "install", str(wheel_from_pypi(Path(folder))))
            print(f"installed Detectron2 {find_detectron2()}")
        check_opencv()
    except InstallError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

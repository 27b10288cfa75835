"""The build backend: setuptools', but an editable install leaves the environment's OpenCV alone.

All that is declared stands in pyproject.toml. A wheel asks for opencv-python wherever it was built;
`pip install -e .` does so where there is no cv2, since opencv-python beside opencv-python-headless
breaks both.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import build_meta, find_packages, setup
from setuptools.build_meta import *  # noqa: F403 (the other hooks)


def has_cv2() -> bool:
    """Whether OpenCV can be imported in the environment installed into, under whatever name.

    pip builds in an environment of its own, whose packages -I keeps out of sight.
    """
    # A folder that an uninstalled OpenCV leaves can be imported, and has nothing in it.
    ask = [sys.executable, "-I", "-c", "import cv2; cv2.imread"]
    return subprocess.run(ask, stderr=subprocess.DEVNULL).returncode == 0


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    if has_cv2():
        metadata = Path(metadata_directory, name, "METADATA")
        text = metadata.read_text("utf-8")
        metadata.write_text(re.sub(r"(?m)^Requires-Dist: opencv-python.*\n", "", text), "utf-8")
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    # pip names the .dist-info that it has, setuptools looks for one in what is named, and writes
    # another where it finds none: so it gets a folder with ours.
    with TemporaryDirectory() as folder:
        prepare_metadata_for_build_editable(folder, config_settings)
        return build_meta.build_editable(wheel_directory, config_settings, folder)


if __name__ == "__main__":
    # Tools are a package of their own, of which one installs what the other needs.
    setup(
        packages=[
            *find_packages(include=["rope_vit_det", "rope_vit_det.*"]),
            "rope_vit_det.configs",
            "rope_vit_det.examples",
            "rope_vit_det_tools",
        ],
        package_dir={
            "rope_vit_det.configs": "configs",
            "rope_vit_det.examples": "examples",
            "rope_vit_det_tools": "tools",
        },
    )

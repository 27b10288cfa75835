"""Packaging; what is needed is declared here and nowhere else, tested versions in constraints.txt.

Detectron2 is needed too, but PyPI has none (the name belongs to nobody): install your own, or run
tools/install_detectron2.py.
"""

import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def has_cv2() -> bool:
    """Whether the environment installed into has OpenCV already, under whatever name.

    pip builds in an environment of its own, whose packages -I keeps out of sight.
    """
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cv2') is None)"
    return subprocess.run([sys.executable, "-I", "-c", find]).returncode == 0


requirements = [
    "torch>=2.8",
    "torchvision>=0.23",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "filelock",
    "huggingface_hub>=0.34",
    "safetensors>=0.4.3",
    "pycocotools>=2.0.2",
    "shapely",  # fvcore crops polygons with it: INPUT.LSJ, INPUT.CROP
    "numpy",
    "pillow",
    "pyyaml",
    "tqdm",
    "matplotlib",
    "jinja2",
    "tabulate",
    "tensorboard",
]
convert = ["supervision>=0.26"]
predict = ["sahi", *convert]
export = ["onnx", "onnxscript", "onnxruntime"]
if not has_cv2():  # opencv-python beside opencv-python-headless breaks both
    requirements.append("opencv-python")

# Command: the tool in tools/ with its main().
commands = {
    "rope-vit-det-analyze": "analyze_model",
    "rope-vit-det-classify": "classify",
    "rope-vit-det-convert-to-coco": "convert_to_coco",
    "rope-vit-det-convert-weights": "convert_weights",
    "rope-vit-det-demo": "demo",
    "rope-vit-det-export": "export_model",
    "rope-vit-det-install-detectron2": "install_detectron2",
    "rope-vit-det-predict": "predict",
    "rope-vit-det-report": "report",
    "rope-vit-det-train": "train_net",
    "rope-vit-det-train-lazy": "lazyconfig_train_net",
    "rope-vit-det-visualize-data": "visualize_data",
    "rope-vit-det-visualize-results": "visualize_results",
}

setup(
    name="rope-vit-det",
    version=re.search(
        r'__version__ = "(.+)"', (HERE / "rope_vit_det" / "__init__.py").read_text("utf-8")
    )[1],
    description="Rotary-position vision transformers as detection backbones in Detectron2",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Tools are a package of their own, of which one installs what the other needs.
    packages=[
        *find_packages(include=["rope_vit_det", "rope_vit_det.*"]),
        "rope_vit_det.configs",
        "rope_vit_det_tools",
    ],
    package_dir={"rope_vit_det.configs": "configs", "rope_vit_det_tools": "tools"},
    package_data={
        "rope_vit_det.configs": ["**/*.yaml", "**/*.py"],
        "rope_vit_det.report": ["report.html"],
        "rope_vit_det.weights": ["published_weights.json"],
    },
    entry_points={
        "console_scripts": [
            f"{command} = rope_vit_det_tools.{tool}:main" for command, tool in commands.items()
        ]
    },
    python_requires=">=3.10",
    install_requires=requirements,
    extras_require={
        "convert": convert,
        "export": export,
        "predict": predict,
        "test": [
            *(
                "pytest",
                "pytest-xdist",
                "birder==0.8.4",
                "timm",
                "hypothesis",
                "ruff",
                "twine",
                "import-linter",
            ),
            *("faster-coco-eval", "import-linter"),
            *convert,
            *export,
            *predict,
        ],
    },
)

"""What users copy first, run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rope_vit_det.data.demo.dataset import generate_demo_dataset

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_runs(trained_folder, small_demo_dataset):
    cells = json.loads((EXAMPLES / "predict_and_features.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    photo = next((small_demo_dataset / "val").glob("*.jpg"))
    code[0] = f"folder, photo = {str(trained_folder)!r}, {str(photo)!r}"  # where they lie here
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(code)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert " objects " in answer.stdout and "(1, 192, 8, 10) (1, 192)" in answer.stdout


def test_the_classifier_in_plain_pytorch_learns():
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    losses = example["main"]("rope_vit_reg4_demo16", steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_plain_script_trains_as_well_as_our_tool(tmp_path):
    """Detectron2's own SGD at the zoo's rate reaches 30 box and 13 mask AP; half an hour."""
    generate_demo_dataset(tmp_path / "rope_vit_det_demo")
    root = EXAMPLES.parent
    found = {}
    for script in ("examples/train_plain.py", "tools/train_net.py"):
        out = tmp_path / Path(script).stem
        options = ("--config-file", root / "configs" / "demo.yaml", "OUTPUT_DIR", out)
        subprocess.run(
            [sys.executable, "-W", "ignore", root / script, *options],
            check=True,
            env=os.environ | {"DETECTRON2_DATASETS": str(tmp_path)},
        )
        rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
        found[script] = [row for row in rows if "bbox/AP" in row][-1]
    plain, tools = found.values()
    for metric in ("bbox/AP", "segm/AP"):
        assert plain[metric] > tools[metric] - 3, found

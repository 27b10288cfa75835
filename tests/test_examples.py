"""What users copy first, run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

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

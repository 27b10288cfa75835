"""The photographs of trees, from PyPI to AP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from projects.aerial_trees import photographs
from rope_vit_det.errors import InputError

ROOT = Path(__file__).parents[2]


def test_another_file_than_the_wheel_is_refused(tmp_path):
    (tmp_path / "deepforest-2.1.0-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"deepforest-2\.1\.0.*has sha256 .* not 8c2798d8"):
        photographs.prepare_photographs(tmp_path)


@pytest.mark.slow
def test_photographs_become_trees(tmp_path):
    """About 10 minutes on two cores; needs PyPI."""
    out = tmp_path / "trees"
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "aerial_trees.py", "--output", out]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    train, val = (
        json.loads((out / "photographs" / f"{split}.json").read_text())
        for split in ("train", "val")
    )
    assert [len(each["images"]) for each in (train, val)] == [3, 1]
    assert [len(each["annotations"]) for each in (train, val)] == [672, 279]
    assert [each["name"] for each in train["categories"]] == ["tree"]
    results = json.loads((out / "results.json").read_text())
    truth = [each["AP"] for name, each in results.items() if "ground truth" in name]
    assert truth == pytest.approx([100, 35.6], abs=0.05)
    assert results["in slices, counting positions"]["AP50"] > 10  # 23 as measured
    assert len(list((out / "drawn").glob("*.png"))) == 1

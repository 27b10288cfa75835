"""20,000 mutated files: nothing but an InputError may come of one, in any reader of weights.

The seed is printed; `FUZZ_SEED` and `FUZZ_COUNT` in the environment set others.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

TESTS = Path(__file__).parents[1] / "support"
SEED = int(os.getenv("FUZZ_SEED", "20261125"))
COUNT = int(os.getenv("FUZZ_COUNT", "20000"))
# Small, so that a file is read in milliseconds.
TINY = dict(patch_size=4, num_layers=1, num_heads=1, hidden_dim=16, mlp_dim=16)


@pytest.mark.slow
def test_mutated_files_neither_crash_nor_hang_nor_run(birder_file, tmp_path, cache):
    folder = tmp_path / "files"
    folder.mkdir()
    for suffix in (".pt", ".safetensors"):
        path, _ = birder_file(size=(16, 16), config=TINY, suffix=suffix)
        path.rename(folder / f"good{suffix}")
    linear = nn.Linear(2, 2).state_dict()
    rest = {"iteration": 3, "classes": {"names": ["a"], "ids": [1]}, "lr": np.float64(0.1)}
    torch.save({"model": linear, **rest}, folder / "good.pth")
    arrays = {key: value.numpy() for key, value in linear.items()}
    (folder / "good.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "us", **rest}))
    answer = subprocess.run(
        [sys.executable, TESTS / "fuzz_weights.py", str(SEED), str(COUNT), folder],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
    )
    print(f"seed {SEED}, {COUNT} files", answer.stdout, sep="\n")
    assert answer.returncode == 0, answer.stderr[-5000:]
    rows = [line.split() for line in answer.stdout.splitlines()]
    counts = {(suffix, what): int(number) for suffix, what, number in rows}
    assert sum(counts.values()) == COUNT
    # Some of each kind still are whole, most are not: else this would test one branch only.
    for suffix in (".pt", ".pth", ".pkl", ".safetensors"):
        assert counts[suffix, "refused"] > 0 and counts[suffix, "read"] > 0

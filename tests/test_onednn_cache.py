"""Importing the package bounds ideep's cache as oneDNN's, and nothing else."""

import os
import subprocess
import sys

import pytest

SHOW = "import os, rope_vit_det; print(os.environ.get('LRU_CACHE_CAPACITY'))"
CONVOLVE = """
import torch
with torch.no_grad():
    for size in range(20, 40):
        torch.nn.Conv2d(8, 16, 3)(torch.zeros(1, 8, size, size))
"""


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "None"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}, "16"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, "1"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "many"}, "None"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "100"}, "100"),
    ],
)
def test_the_bound_is_that_of_onednn(given, expected):
    env = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_CAPACITY")}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHOW + CONVOLVE],
        capture_output=True,
        text=True,
        env=env | given,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stdout.split() == [expected]

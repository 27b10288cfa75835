"""Bounding ideep's cache as oneDNN's."""

import os
import subprocess
import sys

import pytest

from rope_vit_det.utils.memory import bound_caches

IMPORT = """
import os
from rope_vit_det import bound_caches
bound_caches()
print(os.environ.get("LRU_CACHE_CAPACITY"))
"""
CONVOLVE = """
import torch
with torch.no_grad():
    for size in range(20, 40):
        torch.nn.Conv2d(8, 16, 3)(torch.zeros(1, 8, size, size))
"""


@pytest.fixture
def unset(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        # Set first, so that what the test leaves is removed too where nothing was set.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}, "16"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, "1"),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "many"}, None),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "100"}, "100"),
    ],
)
def test_the_bound_is_that_of_onednn(unset, monkeypatch, given, expected):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bound_caches()
    assert os.environ.get("LRU_CACHE_CAPACITY") == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, "1"),
        pytest.param({}, "None", marks=pytest.mark.slow),
        pytest.param({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}, "16", marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_one_that_ideep_survives(given, expected):
    """In a fresh process, since ideep reads its bound once."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_CAPACITY")}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT + CONVOLVE],
        capture_output=True,
        text=True,
        env=env | given,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert answer.stdout.split() == [expected]

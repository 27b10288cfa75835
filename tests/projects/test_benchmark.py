"""The benchmark's command line in a fresh process: what its JSON holds is what its table says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from projects.benchmark.exported import measure_exported
from rope_vit_det.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def run(*arguments):
    command = [sys.executable, "-W", "ignore", TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_table_and_json_agree(tmp_path):
    out = tmp_path / "benchmark.json"
    options = ("--variant", "rope_vit_reg1_t14", "--grids", "4x6", "--window-size", 3)
    networks = ("--networks", "global", "windowed", "birder", "--modes", "forward", "training")
    answer = run(*options, *networks, "--repeats", 2, "--out", out)
    assert answer.returncode == 0, answer.stderr
    results = json.loads(out.read_text())
    assert results["output_difference"] < 1e-5
    measured = results["measurements"]
    assert len(measured) == 3 * 2 * 2  # networks, modes, precisions
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in answer.stdout.splitlines()
        if line.startswith(("| global", "| windowed", "| birder"))
    ]
    for row, m in zip(rows, measured, strict=True):
        assert row[:3] == [m["network"], m["mode"], m["precision"]]
        assert row[4] == f"{m['median_s']:.3f}"
        assert len(m["seconds"]) == 2 and min(m["seconds"]) > 0
        # 84 x 56 px: 24 patches, 12 blocks of 12 * 192**2 weights, and some attention
        work = m["gflops"] * m["median_s"] / (3 if m["mode"] == "training" else 1)
        assert 2 * 24 * 12 * 12 * 192**2 / 1e9 < work < 3 * 24 * 12 * 12 * 192**2 / 1e9


@pytest.mark.slow
def test_an_absent_device_is_one_line():
    answer = run("--device", "cuda", "--networks", "global", "--variant", "rope_vit_reg1_t14")
    import torch

    if torch.cuda.is_available():
        return
    assert answer.returncode == 2 and answer.stderr.count("error:") == 1


@pytest.mark.slow
def test_exported_files_beside_the_eager_model(tmp_path):
    out = tmp_path / "benchmark.json"
    options = ("--networks", "rope_vit_reg4_demo16", "--grids", "4x6", "--repeats", 2)
    answer = run("--exported", *options, "--out", out)
    assert answer.returncode == 0, answer.stderr
    measured = json.loads(out.read_text())["measurements"]
    rows = [line for line in answer.stdout.splitlines() if line.startswith("| rope_vit")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1:5] for row in cells] == [
        [part, "64×96", "64×96", str(batch)]
        for part, batch in (("detector", 1), ("backbone", 1), ("backbone", 8))
    ]
    runtimes = len(measured) // 3
    assert runtimes in (5, 6)  # with bfloat16 where the CPU has it
    for row, part in zip(cells, (measured[i * runtimes :] for i in range(3)), strict=True):
        times = [m["median_s"] for m in part[:runtimes]]
        assert row[5 : 5 + runtimes] == [f"{time:.3f}" for time in times]
        assert row[5 + runtimes] == f"{times[0] / times[3]:.2f}"
    answer = run("--exported", "--device", "cpu")
    assert answer.returncode == 2 and "--exported does not use --device" in answer.stderr


def test_a_network_that_exported_does_not_know_is_named():
    with pytest.raises(
        InputError, match="unknown network 'global'; known are rope_vit_reg4_demo16"
    ):
        measure_exported(["global"])


@pytest.mark.slow
def test_a_detectors_options_are_its_own():
    for wrong, told in (
        (("--modes", "step", "--networks", "eva02"), "unknown 'eva02'; known are windowed, global"),
        (("--modes", "step", "--grids", "4x6"), "--modes step predict does not use --grids"),
        (("--sizes", "64x64"), "only --modes step predict uses --sizes"),
    ):
        answer = run(*wrong)
        assert answer.returncode == 2 and told in answer.stderr

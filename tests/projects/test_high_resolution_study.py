"""The study's settings against what they must do, and a study that is cut off."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import move_off_initial_values, relative_difference

from projects.high_resolution_study.report import format_table
from projects.high_resolution_study.study import all_arms, arm_config
from rope_vit_det.backbone import build_net
from rope_vit_det.engine.setup import load_config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "high_resolution_study.yaml"
TOOL = ROOT / "tools" / "high_resolution_study.py"


def necks(scale):
    """The feature maps of all settings at a scale, with the same weights, by setting."""
    cfg = load_config(Namespace(config_file=str(CONFIG), opts=[]))
    side = round(cfg.INPUT.LSJ.IMAGE_SIZE * scale)
    x = torch.randn(1, 3, side, side)
    state, found = None, {}
    for arm in {replace(arm, fine_tuned=False) for arm in all_arms([scale])}:
        net = build_net(arm_config(cfg, arm)).eval()
        state = state or move_off_initial_values(net).state_dict()
        net.load_state_dict(state)
        with torch.inference_mode():
            found[arm] = net(x)["neck"]
    assert len(found) == 8
    return list(found.values())


def test_at_the_training_size_all_settings_are_one_network():
    first, *others = necks(1.0)
    assert all(relative_difference(other, first) < 1e-5 for other in others)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_beyond_it_no_two_settings_are(scale):
    found = necks(scale)
    for i, one in enumerate(found):
        assert all(relative_difference(other, one) > 1e-4 for other in found[:i])


def test_the_table_has_mean_and_half_range_in_the_cell_of_each_setting():
    results = [
        dict(scale=scale, attention=attention, positions="mapped", table="tiled", fine_tuned=False)
        | dict(AP=[base, base + 3], AP50=[90.0, 90.0])
        for attention, base in (("global", 20.0), ("windowed", 10.0))
        for scale in (1.0, 2.0)
    ]
    results[3]["AP"] = [4.0, 5.0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in format_table(results).splitlines()
    ]
    assert rows[0][-2:] == ["1×", "2×"]
    assert rows[2] == ["frozen", "global", "mapped", "tiled", "21.5 ± 1.5", "21.5 ± 1.5"]
    assert rows[3] == ["frozen", "windowed", "mapped", "tiled", "11.5 ± 1.5", "4.5 ± 0.5"]


@pytest.mark.slow
def test_a_study_goes_on_from_what_is_there(tmp_path, small_demo_dataset):
    env = os.environ | {"DETECTRON2_DATASETS": str(small_demo_dataset.parent)}
    out = tmp_path / "study"

    def run(*options):
        command = [sys.executable, "-W", "ignore", TOOL, "--output", out, "--scales", "1", "1.5"]
        command += ["--fine-tuning-iterations", "2", *options]
        command += ["--", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"]
        return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)

    answer = run()
    assert answer.returncode == 0, answer.stderr
    results = json.loads((out / "results.json").read_text())
    assert len(results) == 2 * 2 * 8  # scales, frozen and fine-tuned, settings
    assert (out / "plot.png").stat().st_size > 10_000

    left = {file: file.stat().st_mtime_ns for file in out.glob("seed0/*")}
    gone = out / "seed0" / "1.5x_windowed_mapped_tiled_fine-tuned.json"
    left.pop(gone)
    gone.unlink()
    answer = run()
    assert answer.returncode == 0, answer.stderr
    assert gone.exists()
    assert all(file.stat().st_mtime_ns == before for file, before in left.items())
    assert json.loads((out / "results.json").read_text()) == results

    answer = run("SOLVER.BASE_LR", "0.5")
    assert answer.returncode == 2 and answer.stderr.count("error:") == 1

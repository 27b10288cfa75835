"""What a detector costs, part by part."""

import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis

from rope_vit_det.report.analysis import analyze, build_detector, detector_complexity

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
TOOL = ROOT / "tools" / "analyze_model.py"
NETWORK = ("--network", "rope_vit_reg1_t16")


def detector(*opts):
    return build_detector(Namespace(config_file=[DEMO], opts=list(opts), eval_only=True))


def test_the_parts_are_those_that_fvcore_counts_in_the_detector():
    parts, padded = detector_complexity(detector(), 100, 120)
    assert padded == (128, 128)
    whole = detector("MODEL.RPN.NMS_THRESH", "1.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0")
    whole.roi_heads.box_predictor.test_nms_thresh = 1.0
    flops = FlopCountAnalysis(whole, [{"image": torch.zeros(3, 100, 120)}])
    counted = flops.unsupported_ops_warnings(False).by_module_and_operator()

    def of(name):
        return sum(n for op, n in counted[f"model.{name}"].items() if "norm" not in op)

    assert parts["proposal_generator"].multiply_adds == of("proposal_generator")
    for head in ("box_head", "box_predictor"):
        assert parts[f"roi_heads.{head}"].multiply_adds == of(f"roi_heads.{head}") > 0
    assert parts["roi_heads.mask_head"].multiply_adds == of("roi_heads.mask_head") > 0
    p7 = 3 * 3 * 64 * 64  # no head takes it, and it is not in fvcore's graph
    assert parts["pyramid"].multiply_adds == of("backbone") - of("backbone.net") + p7
    assert sum(part.parameters for part in parts.values()) == sum(
        parameter.numel() for parameter in whole.parameters()
    )


def test_the_table_names_what_was_counted():
    args = Namespace(config_file=[DEMO], opts=[], size=(100, 120), num_gpus=1, eval_only=False)
    assert f"{DEMO}, an image of 128x128 px" in analyze(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --network or --config-file"),
        ((*NETWORK, "MODEL.ROPE_VIT.WINDOW_SIZE", "8"), "MODEL.ROPE_VIT.WINDOW_SIZE: KEY VALUE"),
        ((*NETWORK, "--patch-stride", "0"), "--patch-stride is 0; allowed: 1 or more"),
        ((*NETWORK, "--window-size", "0", "-1"), "--window-size is -1; allowed: 0 or more"),
        (("--config-file", DEMO, "--window-size", "4"), "has MODEL.ROPE_VIT.WINDOW_SIZE"),
        (("--config-file", DEMO, "--patch-stride", "14"), "has MODEL.ROPE_VIT.PATCH_STRIDE"),
    ],
)
def test_wrong_options_are_named_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line

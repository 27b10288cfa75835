"""The table of learning rates says what the optimizer does."""

import torch
from detectron2.modeling import build_model
from torch import nn

from rope_vit_det.solver.optimizers import build_optimizer, learning_rate_table


def test_every_weight_is_in_a_row_with_its_rate(detector_cfg):
    detector_cfg.SOLVER.BASE_LR, detector_cfg.SOLVER.WEIGHT_DECAY = 0.1, 0.25
    detector_cfg.SOLVER.LAYER_DECAY = 0.5
    detector_cfg.MODEL.ROPE_VIT.FREEZE_BLOCKS = 2
    model = build_model(detector_cfg)
    table = learning_rate_table(model, build_optimizer(detector_cfg, model))
    rows = [line.rsplit(maxsplit=3) for line in table.splitlines()[2:]]
    frozen = [line.split() for line in table.splitlines()[2:] if "frozen" in line]
    total = sum(int(line.split()[-1].replace(",", "")) for line in table.splitlines()[2:])
    assert total == sum(p.numel() for p in model.parameters())
    assert {words[0] for words in frozen} == {
        "backbone.net",
        "backbone.net.encoder.block.0",
        "backbone.net.encoder.block.1",
    }
    rates = {row[0].strip(): row[1] for row in rows if "frozen" not in " ".join(row)}
    assert rates["backbone.net.encoder.block.11"] == "0.05"
    assert rates["backbone.net.encoder.block.9"] == "0.0125"
    assert rates["roi_heads.box_head"] == rates["proposal_generator"] == "0.1"
    assert {row[2] for row in rows if "frozen" not in " ".join(row)} == {"0.25", "0.0"}


def test_another_network_under_the_same_name_has_no_stem_of_ours():
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": nn.Linear(3, 2)})})
    table = learning_rate_table(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (row,) = table.splitlines()[2:]
    assert row.split() == ["backbone", "0.1", "0", "8"]

"""Both networks of the comparison, and what is read from their runs."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from projects.versus_vitdet.report import format_table, plot
from projects.versus_vitdet.run import CONFIG, NETWORKS, TASKS, Run, _read, train_all
from rope_vit_det import add_rope_vit_config


def test_the_networks_have_the_same_sizes_and_the_same_pyramid():
    cfg = get_cfg()
    add_rope_vit_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    built = [BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3)) for name in NETWORKS.values()]
    outputs = [
        {k: v.shape for k, v in pyramid(torch.zeros(1, 3, 96, 160)).items()} for pyramid in built
    ]
    assert outputs[0] == outputs[1]

    def matrices(net):
        """Of the blocks' linear layers."""
        return sorted(tuple(m.weight.shape) for m in net.modules() if hasattr(m, "in_features"))

    ours, theirs = (matrices(pyramid.net) for pyramid in built)
    assert ours == theirs and len(ours) == 4 * 4
    heads = [
        {k: v.shape for k, v in pyramid.state_dict().items() if not k.startswith("net.")}
        for pyramid in built
    ]
    assert heads[0] == heads[1]
    assert [block.window_size for block in built[1].net.blocks] == [14, 0, 14, 0]


def _runs():
    for seed, better in ((1, 0.0), (2, 2.0)):
        for network, time in (("ours", 1.0), ("theirs", 2.0)):
            found = [10.0 + better, 20.0 + better]
            yield Run(network, seed, [100, 200], [time, 2 * time], dict.fromkeys(TASKS, found))


def test_the_table_compares_after_as_many_iterations_and_as_many_minutes(tmp_path):
    table = format_table(list(_runs()))
    rows = [[c.strip() for c in line.split("|")[1:4]] for line in table.splitlines() if "|" in line]
    assert rows[2:] == [
        ["100 iterations", "11.0 ± 1.0", "11.0 ± 1.0"],
        ["200 iterations", "21.0 ± 1.0", "21.0 ± 1.0"],
        ["1 min", "11.0 ± 1.0", "5.5 ± 0.5"],
        ["2 min", "21.0 ± 1.0", "11.0 ± 1.0"],
    ]
    plot(list(_runs()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_minutes_are_those_of_the_iterations_alone(tmp_path):
    rows = [{"iteration": i, "time": 0.5, "total_loss": 1.0} for i in (19, 39, 59)]
    rows[1] |= {"bbox/AP": 1.0, "segm/AP": 2.0}
    rows.append({"iteration": 60, "bbox/AP": 3.0, "segm/AP": 4.0})
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    run = _read(tmp_path, "ours", 1)
    assert run.iterations == [40, 60]
    assert np.allclose(run.minutes, [20 / 60, 30 / 60])
    assert run.precisions == {"bbox": [1.0, 3.0], "segm": [2.0, 4.0]}


@pytest.mark.slow
def test_runs_that_are_there_are_not_made_again(tmp_path, small_demo_dataset, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_demo_dataset.parent))
    tiny = ("SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64")
    runs = train_all(tmp_path, [1], tiny)
    assert [(run.network, run.iterations) for run in runs] == [(name, [2]) for name in NETWORKS]
    written = {path: path.stat().st_mtime for path in tmp_path.rglob("*.pth")}
    assert train_all(tmp_path, [1], tiny) == runs
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*.pth")} == written

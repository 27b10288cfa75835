"""The curves: what is asked for is on them."""

import json

import cv2

from rope_vit_det.evaluation.plots import plot_curves


def test_curves_show_every_loss_and_ap(tmp_path, monkeypatch):
    rows = [
        {"iteration": i, "total_loss": 2.0 / (i + 1), "loss_mask": 0.5, "lr": 0.1} for i in range(5)
    ]
    rows += [{"iteration": 4, "bbox/AP": 40.0, "segm/AP": 36.0, "bbox/AP-disc": 50.0}]
    rows += [{"iteration": 4, "far/two/bbox/AP": 30.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot

    def spy(self, *args, **kwargs):
        drawn.append((kwargs["label"], list(args[1])))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    plot_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 1
    assert ("total loss", [2.0 / (i + 1) for i in range(5)]) in drawn
    assert ("loss mask", [0.5] * 5) in drawn
    assert ("box", [40.0]) in drawn and ("mask", [36.0]) in drawn
    assert ("far/two box", [30.0]) in drawn
    assert len(drawn) == 5


def test_curves_of_a_run_without_evaluation(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    plot_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")) is not None


def test_curves_of_a_run_that_finds_nothing_at_first(tmp_path):
    rows = [{"iteration": i, "bbox/AP": ap} for i, ap in enumerate((float("nan"), 0.0))]
    for number in (1, 2):
        (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows[:number])) + "\n")
        plot_curves(tmp_path / "metrics.json", tmp_path / f"{number}.png")
        assert cv2.imread(str(tmp_path / f"{number}.png")) is not None

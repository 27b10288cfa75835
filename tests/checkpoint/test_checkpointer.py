"""What a run reads of its checkpoints."""

import pytest
import torch
from torch import nn

from rope_vit_det.checkpoint import checkpoint_files, checkpointer
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError


def test_a_resumed_run_reads_and_verifies_its_checkpoint_once(monkeypatch, tmp_path):
    trained, resumed = nn.Linear(3, 2), nn.Linear(3, 2)
    for iteration in (1, 2):
        DetectorCheckpointer(trained, str(tmp_path)).save(
            f"model_{iteration:07d}", iteration=iteration
        )
    read = []
    for module in (checkpoint_files, checkpointer):
        load = module.load_torch_file
        monkeypatch.setattr(
            module,
            "load_torch_file",
            lambda path, *args, load=load, **kwargs: (
                read.append(str(path)) or load(path, *args, **kwargs)
            ),
        )
    rest = DetectorCheckpointer(resumed, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 2 and torch.equal(resumed.weight, trained.weight)
    assert read == [str(tmp_path / "model_0000002.pth")]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    trained, resumed = nn.Linear(3, 2), nn.Linear(3, 2)
    for iteration in (1, 2):
        DetectorCheckpointer(trained, str(tmp_path)).save(
            f"model_{iteration:07d}", iteration=iteration
        )
    newest = tmp_path / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:-50])
    rest = DetectorCheckpointer(resumed, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1 and torch.equal(resumed.weight, trained.weight)


def test_a_detector_of_other_classes_is_not_evaluated(tmp_path):
    names = {"names": ["cat", "dog"], "ids": [1, 2]}
    DetectorCheckpointer(nn.Linear(3, 2), str(tmp_path), classes=names).save("model_final")
    others = {"names": ["dog", "cat"], "ids": [1, 2]}
    reader = DetectorCheckpointer(nn.Linear(3, 2), classes=others, whole=True)
    with pytest.raises(InputError, match=r"model_final\.pth: .*categories"):
        reader.load(str(tmp_path / "model_final.pth"))


def test_another_network_under_the_same_name_is_not_told_to_set_ours(tmp_path):
    def detector(width):
        return nn.ModuleDict({"backbone": nn.ModuleDict({"net": nn.Linear(3, width)})})

    DetectorCheckpointer(detector(2), str(tmp_path)).save("model_final")
    path = str(tmp_path / "model_final.pth")
    DetectorCheckpointer(detector(4)).load(path)  # Detectron2 leaves it out, with a log line
    with pytest.raises(InputError, match=r"backbone\.net\.weight has shape .* take the config"):
        DetectorCheckpointer(detector(4), whole=True).load(path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_of_a_compiled_model_are_those_of_the_model(tmp_path, prefix, compiled):
    trained, other = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    model = torch.compile(other) if compiled else other
    if compiled and prefix.startswith("module."):
        return  # Detectron2 takes DDP's prefix off for a model without one alone
    DetectorCheckpointer(model, whole=True).load(str(tmp_path / "model.pth"))
    for name, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)

"""Checkpoints as files: whole or not there, found again when the newest is damaged, pruned."""

import logging
import resource

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import DiskFullError, InputError


@pytest.fixture
def model():
    return torch.nn.Linear(128, 512)  # 256 KiB


@pytest.fixture
def checkpointer(model, tmp_path):
    """Of a folder with three checkpoints, whose weights are 0, 1 and 2."""
    checkpointer = DetectorCheckpointer(model, str(tmp_path))
    for number in range(3):
        torch.nn.init.constant_(model.weight, number)
        checkpointer.save(f"model_{number:07d}", iteration=number)
    return checkpointer


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path):
    path.write_bytes(b"")


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _fill_with_nan(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["weight"][3, 3] = torch.nan
    torch.save(checkpoint, path)


def _remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip_a_bit, _fill_with_nan, _remove])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(
    checkpointer, model, tmp_path, damage, caplog
):
    damage(tmp_path / "model_0000002.pth")
    caplog.set_level(logging.WARNING)
    loaded = checkpointer.resume_or_load("", resume=True)
    assert loaded["iteration"] == 1
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    assert "model_0000002.pth" in caplog.text and "model_0000001.pth" in caplog.text


def test_where_all_are_damaged_the_run_does_not_begin_anew(checkpointer, tmp_path):
    for path in tmp_path.glob("*.pth"):
        _truncate(path)
    with pytest.raises(InputError, match=r"model_0000002.*model_0000001.*model_0000000"):
        checkpointer.resume_or_load("", resume=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(checkpointer, model, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, hard))
    try:
        with pytest.raises(DiskFullError) as error:
            checkpointer.save("model_0000003", iteration=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "model_0000003.pth cannot be written: File too large" in str(error.value)
    assert str(error.value).endswith(f"the last good checkpoint is {tmp_path}/model_0000002.pth")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_write_that_ends_halfway_leaves_everything_as_it_was(checkpointer, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(data, file):
        file.write(b"half")
        (tmp_path / ".model_0000002.pth.from-a-killed-process.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        checkpointer.save("model_0000002", iteration=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names - set(before)) == 1  # what a kill leaves, until the next save
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    checkpointer.save("model_0000003", iteration=3)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "model_0000003.pth"}


def test_only_the_newest_periodic_checkpoints_are_kept(checkpointer, model, tmp_path):
    checkpointer.save("model_best", iteration=2)
    pruning = DetectorCheckpointer(model, str(tmp_path), keep=2)  # as after a resume
    pruning.save("model_0000003", iteration=3)
    pruning.save("model_final", iteration=3)
    kept = {path.name for path in tmp_path.glob("*.pth")}
    assert kept == {"model_0000002.pth", "model_0000003.pth", "model_final.pth", "model_best.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_detectron2_resumes_from_them(checkpointer, tmp_path):
    other = torch.nn.Linear(128, 512)
    loaded = DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert loaded["iteration"] == 2
    assert torch.equal(other.weight, torch.full_like(other.weight, 2))

"""The folder of a run is not written over unasked, and nothing in it is ever deleted."""

import re

import pytest

from rope_vit_det.data.validation.check import FAULTS_FILE
from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.run_folder import check_output, clear_output, config_kept, describe_output
from rope_vit_det.errors import InputError


@pytest.fixture
def earlier(tmp_path):
    """A folder that an earlier run left."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "model_final.pth").write_text("weights of the first run")
    return folder


def check(folder, *options):
    check_output(str(folder), argument_parser().parse_args(options))


def clear(folder, *options):
    clear_output(str(folder), argument_parser().parse_args(options))


def test_a_folder_with_checkpoints_is_refused_and_the_ways_out_named(earlier):
    with pytest.raises(InputError, match=r"--resume .*OUTPUT_DIR.* --overwrite") as refused:
        check(earlier)
    assert str(earlier) in str(refused.value)
    for option in ("--resume", "--eval-only", "--overwrite"):
        check(earlier, option)
    check(earlier.with_name("another"))
    (earlier / "last_checkpoint").unlink()
    check(earlier)


@pytest.mark.parametrize("other", ["--resume", "--eval-only"])
def test_overwrite_beside_what_keeps_the_folder(earlier, other):
    with pytest.raises(InputError, match=other):
        check(earlier, "--overwrite", other)


def test_overwrite_does_not_move_the_folder_one_is_in(earlier, monkeypatch):
    monkeypatch.chdir(earlier)
    for folder in (".", earlier, earlier.parent):
        with pytest.raises(InputError, match="current folder"):
            check(folder, "--overwrite")


def test_overwrite_moves_every_earlier_run_to_a_place_of_its_own(earlier, capsys):
    clear(earlier)
    assert earlier.exists()
    for number, name in enumerate(("out.previous", "out.previous-2", "out.previous-3")):
        clear(earlier, "--overwrite")
        assert not earlier.exists()
        assert name in capsys.readouterr().out
        earlier.mkdir()
        (earlier / "model_final.pth").write_text(f"weights {number}")
    texts = {path.parent.name: path.read_text() for path in earlier.parent.rglob("*.pth")}
    assert texts == {
        "out": "weights 2",
        "out.previous": "weights of the first run",
        "out.previous-2": "weights 0",
        "out.previous-3": "weights 1",
    }


def test_overwrite_keeps_what_the_check_of_the_datasets_has_just_written(earlier):
    (earlier / FAULTS_FILE).write_text("a fault")
    clear(earlier, "--overwrite")
    assert [path.name for path in earlier.iterdir()] == [FAULTS_FILE]
    clear(earlier, "--overwrite")
    assert not earlier.with_name("out.previous-2").exists()


def test_other_machines_leave_the_folder_alone(earlier):
    clear(earlier, "--overwrite", "--num-machines", "2", "--machine-rank", "1")
    assert earlier.exists()


def test_what_lies_there_is_told(earlier):
    told = describe_output(str(earlier))
    assert str(earlier) in told
    assert re.search(r"^  model_final\.pth +the trained", told, re.MULTILINE)
    assert "metrics.json" not in told


@pytest.mark.parametrize("is_training", [True, False])
def test_the_config_of_a_training_stays(earlier, is_training):
    config = earlier / "config.yaml"
    config.write_text("the first")
    if not is_training:
        (earlier / "last_checkpoint").unlink()
    with pytest.raises(OSError), config_kept(str(earlier)):
        config.write_text("another")
        raise OSError
    assert config.read_text() == ("the first" if is_training else "another")


def test_where_a_training_left_no_config_the_evaluations_stays(earlier):
    with config_kept(str(earlier)):
        (earlier / "config.yaml").write_text("another")
    assert (earlier / "config.yaml").read_text() == "another"

"""The rehearsal ends what would end a run, and leaves nothing behind."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from rope_vit_det.engine.command_line import argument_parser
from rope_vit_det.engine.rehearsal import Parts, rehearse
from rope_vit_det.engine.run_folder import TRACEBACK_FILE, move_aside
from rope_vit_det.errors import InputError


def _rehearse(tmp_path, model, **options):
    args = argument_parser().parse_args(options.pop("flags", []))
    args.num_gpus = options.pop("processes", 1)

    def build(folder):
        assert folder != str(tmp_path)
        return Parts(model=model, train_step=None, test_sets={}, **options)

    rehearse(build, args, output=str(tmp_path), device="cpu")


def _draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def _seed():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def _fail():
    raise OverflowError("too\n  much of sour")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_users_exception_is_one_line_with_key_file_and_line(tmp_path, processes):
    with pytest.raises(InputError) as error:
        _rehearse(tmp_path, _fail, processes=processes, values={"sour": "MODEL.TASTE"})
    line = str(error.value)
    assert line.startswith("MODEL.TASTE is 'sour'; rehearsal, building the model: OverflowError")
    assert "too much of sour" in line and f"({__file__}, line " in line and "\n" not in line
    assert "in _fail" in (tmp_path / TRACEBACK_FILE).read_text()
    move_aside(str(tmp_path))  # its traceback is no run
    assert (tmp_path / TRACEBACK_FILE).exists()


def _fail_with_cause():
    try:
        _fail()
    except OverflowError as error:
        raise InputError("the ground truth is sour") from error


def test_a_known_error_keeps_the_traceback_of_its_cause(tmp_path):
    with pytest.raises(InputError, match=f"^the ground truth is sour; .*{TRACEBACK_FILE}$"):
        _rehearse(tmp_path, _fail_with_cause)
    assert "in _fail\n" in (tmp_path / TRACEBACK_FILE).read_text()


def test_random_numbers_go_on_as_without_it(tmp_path):
    _seed()
    expected = _draws()
    _seed()
    _rehearse(tmp_path, lambda: (_draws(), torch.manual_seed(5), nn.Linear(2, 2))[-1])
    assert _draws() == expected


def test_the_option_leaves_it_out(tmp_path):
    _rehearse(tmp_path, _fail, flags=["--no-rehearsal"])


def test_what_an_earlier_rehearsal_left_goes(tmp_path):
    (tmp_path / TRACEBACK_FILE).write_text("old")
    _rehearse(tmp_path, lambda: nn.Linear(2, 2))
    assert not (tmp_path / TRACEBACK_FILE).exists()

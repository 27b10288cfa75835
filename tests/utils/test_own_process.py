"""Processes that are gone afterwards."""

import gc
import os
import threading
from functools import partial

import pytest

from rope_vit_det.errors import InputError, RunError
from rope_vit_det.utils.atomic_files import check_new_file
from rope_vit_det.utils.own_process import in_own_process


def test_results_errors_and_deaths_come_back(tmp_path):
    assert in_own_process(os.getpid, "work") != os.getpid()
    with pytest.raises(InputError, match="is a folder"):
        in_own_process(partial(check_new_file, tmp_path), "work")
    with pytest.raises(RunError, match="the process of work ended with exit status 3"):
        in_own_process(partial(os._exit, 3), "work")


class _Pool:
    """Ends with threads, which a fork does not have."""

    def __init__(self):
        self.cycle, self.process = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.process:
            threading.Event().wait()


def test_what_is_of_no_more_use_is_not_taken_down_in_there():
    _Pool()
    assert isinstance(in_own_process(gc.collect, "work"), int)

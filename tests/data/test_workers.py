"""Loader workers under every start method, and where a platform has fewer signals."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from rope_vit_det.data.workers import ShieldedLoader

# Longer than the workers take to look for their parent.
SLOW = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from rope_vit_det.data import workers

def slowly(i):
    time.sleep(1.5)
    return os.getpid()

class Data:
    def __len__(self): return 4
    def __getitem__(self, i): return slowly(i)

def start():
    workers._LOOK_FOR_THE_PARENT = 0.2  # of this process, and of what it forks
    return iter(workers.ShieldedLoader(DataLoader(
        Data(), num_workers=2, batch_size=None, multiprocessing_context=sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_stay_while_their_parent_does_and_no_longer(tmp_path, method):
    (tmp_path / "slow.py").write_text(SLOW)
    code = (
        "from slow import *\n"
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_forkserver_preload(['slow'])\n"  # imports of a while, once
        "    it = start()\n"
        "    pids = {next(it) for _ in range(2)}\n"
        "    [os.kill(pid, signal.SIGTERM) for pid in pids]\n"  # of the parent: they end
        "    it2 = start()\n"
        "    print(*{next(it2) for _ in range(2)}, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "main.py").write_text(code)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "main.py", method],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((os.getcwd(), str(tmp_path)))},
        timeout=280,
    )
    pids = [int(pid) for pid in answer.stdout.split()]
    assert len(pids) == 2, answer.stderr[-2000:]
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") and _runs(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_the_signals_of_some_platforms_it_imports_loads_and_predicts(
    trained_folder, tmp_path
):
    code = f"""
import signal
for name in ("pthread_sigmask", "sigtimedwait", "SIGUSR1", "sigwaitinfo", "sigpending"):
    delattr(signal, name)
import numpy as np
import rope_vit_det
from torch.utils.data import DataLoader
from rope_vit_det.data.workers import ShieldedLoader
from rope_vit_det.distributed.signals import StopRequest
import rope_vit_det.engine.main
print(sorted(ShieldedLoader(DataLoader(range(6), num_workers=2, batch_size=None))))
with StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
print(stop.signal)
predictor = rope_vit_det.Predictor({str(trained_folder)!r})
predictor(np.zeros((64, 64, 3), np.uint8))
print("predicted")
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        timeout=100,
    )
    assert answer.stdout.splitlines()[-3:] == ["[0, 1, 2, 3, 4, 5]", "SIGTERM", "predicted"], (
        answer.stderr[-2000:]
    )


def test_workers_ignore_a_terminal():
    class Killer:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGINT)
            return i

    loader = ShieldedLoader(DataLoader(Killer(), num_workers=1, batch_size=None))
    assert list(loader) == [0, 1, 2]

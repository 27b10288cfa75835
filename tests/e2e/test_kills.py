"""Runs that are killed at random moments, and what is left of them."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import differences, metrics_without_times

ROOT = Path(__file__).parents[2]
TRAIN = (ROOT / "tools" / "train_net.py", "--config-file", ROOT / "configs" / "demo.yaml")
TINY = (
    *("SOLVER.MAX_ITER", "24", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "3"),
    *("SOLVER.AMP.ENABLED", "False", "SOLVER.EMA.ENABLED", "True", "SOLVER.KEEP_CHECKPOINTS", "3"),
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(64,80)",
        "INPUT.MAX_SIZE_TRAIN",
        "128",
        "INPUT.MIN_SIZE_TEST",
        "64",
    ),
    *("MODEL.ROPE_VIT.DROP_PATH_RATE", "0.3", "TEST.EVAL_PERIOD", "8"),
    *("DATALOADER.NUM_WORKERS", "2"),
)


@pytest.fixture
def start(small_demo_dataset, tmp_path):
    """Starts a training, as a process group of its own; its output goes to a file."""
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    started = []

    def start(output, *arguments, command=TRAIN):
        with open(tmp_path / "printed.txt", "w") as printed:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *map(str, command), *map(str, arguments)],
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env=environment,
                start_new_session=True,
            )
        process.printed = lambda: (tmp_path / "printed.txt").read_text()
        process.output = tmp_path / output
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process, happened, seconds=300):
    """Until something happened, or the process is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < end, process.printed()[-3000:]
        time.sleep(0.002)


def _says(process, text):
    return lambda: text in process.printed()


def _kill(process, moment, rng):
    """kill -9 at a moment; now and then of the first process alone."""
    _wait(process, _says(process, "Starting training from iteration"))
    if moment == "checkpoint":
        _wait(process, lambda: any(process.output.glob(".model_*.tmp")))
    elif moment == "evaluation":
        _wait(process, _says(process, "Start inference on"))
        time.sleep(rng.uniform(0, 0.3))
    else:
        time.sleep(rng.uniform(0, 8))
    if process.poll() is not None:
        return False
    if rng.random() < 0.5:
        process.kill()
        process.wait()
        time.sleep(rng.uniform(0, 2))  # its workers, or the other process, are still there
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def _end(process):
    status = process.wait(timeout=500)
    assert status == 0, process.printed()[-3000:]


def _same_end(one, other):
    assert metrics_without_times(one) and not differences(
        metrics_without_times(one), metrics_without_times(other)
    )
    final = [torch.load(f / "model_final.pth", weights_only=True) for f in (one, other)]
    assert differences(*final) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"), [((), 20), (("--num-gpus", "2"), 6)], ids=["one", "two processes"]
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(start, tmp_path, options, kills):
    seed = int(os.environ.get("KILL_SEED", time.time()))
    print("KILL_SEED", seed)
    rng = random.Random(seed)
    kills = int(os.environ.get("KILLS", kills))
    killed = rng.sample(["checkpoint"] * 5 + ["evaluation"] * 5 + ["any"] * 10, kills)
    for number, moment in enumerate(killed):
        # The first process may still have been at the start; --resume begins the run then.
        process = start("cut", *options, "--resume", *TINY, "SEED", "-1", "OUTPUT_DIR", "cut")
        if not _kill(process, moment, rng):
            # It ended before: go back, as if it had been killed at an earlier moment.
            _end(process)
            print(f"kill {number}: came too late")
            tag = tmp_path / "cut" / "last_checkpoint"
            tag.write_text(min(p.name for p in tag.parent.glob("model_00*.pth")))
            continue
        reached = re.findall(r"Saving checkpoint to .*(model_\w+)", process.printed())
        print(f"kill {number}: {moment}, last checkpoint written {reached[-1:]}")
    _end(start("cut", *options, "--resume", *TINY, "SEED", "-1", "OUTPUT_DIR", "cut"))
    drawn = (tmp_path / "cut" / "seed.txt").read_text().strip()
    _end(start("whole", *options, *TINY, "SEED", drawn, "OUTPUT_DIR", "whole"))
    _same_end(tmp_path / "cut", tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".model_*.tmp"))
    assert len(list((tmp_path / "cut").glob("model_0*.pth"))) == 3


def _ranks(process):
    """The process ids of a run's two processes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [p for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return list(map(int, ours))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--num-gpus", "2")], ids=["one", "two processes"])
def test_a_signal_ends_the_run_with_a_checkpoint(start, tmp_path, options, number):
    process = start("cut", *options, *TINY, "OUTPUT_DIR", "cut")
    _wait(process, _says(process, "Starting training from iteration"))
    time.sleep(3)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C, which reaches the workers too
    assert process.wait(timeout=120) == 75, process.printed()[-3000:]
    last = process.printed().splitlines()[-1]
    said = re.fullmatch(r"stopped: .* after iteration (\d+); the checkpoint is (.*\.pth); .*", last)
    assert torch.load(tmp_path / said[2], weights_only=True)["iteration"] == int(said[1])
    _end(start("cut", *options, "--resume", *TINY, "OUTPUT_DIR", "cut"))
    _end(start("whole", *options, *TINY, "OUTPUT_DIR", "whole"))
    _same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(start):
    process = start("out", *TINY, "SOLVER.MAX_ITER", "1000", "OUTPUT_DIR", "out")
    _wait(process, _says(process, "Starting training from iteration"))
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_others_without_a_checkpoint(start):
    process = start(
        *("out", "--num-gpus", "2", *TINY, "SOLVER.MAX_ITER", "1000"),
        *("SOLVER.CHECKPOINT_PERIOD", "1000", "OUTPUT_DIR", "out"),
    )
    _wait(process, _says(process, "Starting training from iteration"))
    time.sleep(3)
    ranks = _ranks(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    assert "error: process 1 terminated with signal SIGKILL" in process.printed()
    assert not list(process.output.glob("*.pth"))
    end = time.monotonic() + 30
    while left := _processes_in(process.output.parent):  # loader workers
        assert time.monotonic() < end, left
        time.sleep(0.5)


def _processes_in(folder):
    """The process ids of all that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # over already
            if (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
    return found

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
    environment = {
        "DETECTRON2_DATASETS": str(small_demo_dataset.parent),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    started = []

    def start(output, *arguments, command=(sys.executable, *TRAIN)):
        with open(tmp_path / "printed.txt", "w") as printed:
            process = subprocess.Popen(
                [*map(str, command), *map(str, arguments)],
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env=os.environ | environment,
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


def _ranks(process, command=b"spawn_main"):
    """The process ids of a run's two processes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [p for p in children if command in Path(f"/proc/{p}/cmdline").read_bytes()]
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


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_where_it_was(start, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    restarted = (*torchrun, "--max-restarts", "2", *TRAIN)
    process = start("cut", "--resume", *TINY, "OUTPUT_DIR", "cut", command=restarted)
    for name in ("model_0000005.pth", "model_0000014.pth"):
        _wait(process, (process.output / name).exists)
        os.kill(_ranks(process, b"train_net.py")[1], signal.SIGKILL)
    _end(process)
    assert re.findall(r"from iteration (\d+)", process.printed())[0] == "0"
    _end(start("whole", *TINY, "OUTPUT_DIR", "whole", command=(*torchrun, *TRAIN)))
    _same_end(tmp_path / "cut", tmp_path / "whole")


def _stand_in(folder, name, lines):
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands on one machine; a job that is put into the queue again is in `requeued`."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    _stand_in(bin_, "srun", 'exec env SLURM_NODEID=0 "$@"')
    hosts_or_job = '[ "$1" = show ] && echo localhost || echo "$2" >>requeued'
    _stand_in(bin_, "scontrol", hosts_or_job)
    job = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    path = f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    return ("bash", ROOT / "tools" / "slurm_train.sh")


@pytest.mark.parametrize(("status", "requeued"), [(75, ["12345"]), (0, []), (2, []), (1, [])])
def test_slurm_queues_a_stopped_run_again_and_no_other(start, tmp_path, slurm, status, requeued):
    _stand_in(tmp_path / "bin", "python", f'echo "$@"; exit {status}')
    process = start("out", "--config-file", "my c.yaml", "SEED", "3", command=slurm)
    assert process.wait(timeout=30) == status
    queue = tmp_path / "requeued"
    assert (queue.read_text().split() if queue.exists() else []) == requeued
    given = (
        "tools/train_net.py --resume --num-gpus 1 --num-machines 1 --machine-rank 0 "
        "--dist-url tcp://localhost:22345 --config-file my c.yaml SEED 3\n"
    )
    assert process.printed() == given


@pytest.mark.slow
def test_a_job_of_slurm_goes_on_after_its_time_limit(start, tmp_path, slurm):
    config = (*TRAIN[1:], *TINY, "OUTPUT_DIR")
    process = start("cut", *config, "cut", command=slurm)
    _wait(process, _says(process, "Starting training from iteration"))
    time.sleep(3)
    (step,) = _ranks(process, b"train_net.py")
    os.kill(step, signal.SIGTERM)
    assert process.wait(timeout=120) == 75, process.printed()[-3000:]
    assert (tmp_path / "requeued").read_text() == "12345\n"
    _end(start("cut", *config, "cut", command=slurm))  # as SLURM starts it again
    assert (tmp_path / "requeued").read_text() == "12345\n"
    _end(start("whole", *TINY, "OUTPUT_DIR", "whole"))
    _same_end(tmp_path / "cut", tmp_path / "whole")


def _processes_in(folder):
    """The process ids of all that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # over already
            if (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
    return found

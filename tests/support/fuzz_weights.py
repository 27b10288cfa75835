"""Reads mutated weights files in a process of its own: `python fuzz_weights.py SEED COUNT FOLDER`.

FOLDER has good files, `*.pt`, `*.pth`, `*.safetensors` and `*.pkl`. The process ends with status 0
and a line for each suffix if nothing but an InputError ever came of a file; otherwise it leaves the
file in FOLDER as `culprit`.
"""

import faulthandler
import logging
import os
import random
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from mutated_files import mutated
from torch import nn

from rope_vit_det import load_model
from rope_vit_det.checkpoint.checkpointer import DetectorCheckpointer
from rope_vit_det.errors import InputError

LIMIT = 60  # seconds for a file, on a busy machine
MEMORY = 16 * 2**30  # bytes of address space
NETWORK = "rope_vit_reg1_t16"
# What no reader has to do (https://docs.python.org/3/library/audit_events.html).
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
             "socket.connect", "os.remove", "os.rename", "shutil.rmtree", "os.kill")  # fmt: skip


class _CodeRanError(BaseException):
    """Not an Exception, so that nothing on the way takes it for a damaged file."""


def _watch(event: str, args: tuple) -> None:
    if _reading and event in FORBIDDEN:
        raise _CodeRanError(f"{event} {args}")


_reading = False


def _read(path: Path, number: int) -> None:
    if path.suffix in (".pth", ".pkl"):
        DetectorCheckpointer(nn.Linear(2, 2)).load(str(path))
    elif number % 8:
        load_model(path, network=NETWORK)
    else:  # as MODEL.WEIGHTS of a detector
        DetectorCheckpointer(nn.Linear(2, 2)).load(str(path))


def main(seed: int, count: int, folder: Path) -> None:
    global _reading
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    sys.addaudithook(_watch)
    good = {path.suffix: path.read_bytes() for path in folder.glob("good.*")}
    rng = random.Random(seed)
    told: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        suffix = rng.choice(sorted(good))
        path = folder / f"culprit{suffix}"
        path.write_bytes(mutated(rng, good[suffix], list(good.values()), suffix))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        _reading = suffix in (".pth", ".pkl") or bool(number % 8)
        try:
            _read(path, number)
            told[suffix, "read"] += 1
        except InputError as error:
            assert "\n" not in str(error), error
            told[suffix, "refused"] += 1
        except BaseException:
            print(f"seed {seed}, file {number}: {path}", file=sys.stderr)
            raise
        finally:
            _reading = False
            faulthandler.cancel_dump_traceback_later()
        path.unlink()
        if os.path.exists("fuzz-was-here"):
            raise SystemExit(f"seed {seed}, file {number}: code was run")
    for (suffix, what), number in sorted(told.items()):
        print(suffix, what, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

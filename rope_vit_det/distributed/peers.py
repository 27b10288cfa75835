"""The processes of a run end together."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

_FOREVER = timedelta(days=3650)
# Seconds for the main thread to end by itself, with the traceback of its broken collective.
_GRACE = 10


@contextmanager
def peers_watched() -> Iterator[None]:
    """While this is entered, the death of another process ends this one within seconds.

    A broken collective does that by itself, but not during an evaluation, nor under NCCL. To be
    entered by all processes; they leave it together.
    """
    others = [rank for rank in range(comm.get_world_size()) if rank != comm.get_rank()]
    if not others:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    assert isinstance(group, dist.ProcessGroup)  # a number in processes that it leaves out
    watching = [threading.Thread(target=_watch, args=(r, group), daemon=True) for r in others]
    for thread in watching:
        thread.start()
    yield
    for rank in others:
        dist.send(torch.zeros(1), rank, group=group)
    for thread in watching:
        thread.join()


def _watch(rank: int, group: dist.ProcessGroup) -> None:
    try:
        # Nothing comes before the other leaves; until then the system watches the connection.
        dist.recv(torch.zeros(1), rank, group=group)
    except RuntimeError:
        time.sleep(_GRACE)
        os.write(2, f"process {rank} of the run is gone: this one ends too\n".encode())
        os._exit(1)

"""Processes: started by Detectron2's launch or by torchrun, on GPUs (NCCL) or the CPU (gloo)."""

import argparse
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import nn
from torch.distributed import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import InputError, RunError, print_any_text
from ..pyramids import uses_all_parameters
from .signals import signals_passed_on

_DIST_URL = re.compile(r"tcp://.+:\d+$|file:///.|auto$")
_MAX_NUMBERS = 256


def check_processes(args: argparse.Namespace, device: str) -> None:
    """Checks that the processes which a command line asks for can run here.

    Args:
        args: with `num_gpus`: GPUs, or on the CPU processes, of this machine.
        device: of the model, "cpu" or "cuda".

    Raises:
        InputError: they cannot; says why.
    """
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--num-machines {args.num_machines} --machine-rank {args.machine_rank}: give 1 or "
            "more machines, and a rank from 0 to one less than there are machines"
        )
    if args.num_gpus < 1:
        raise InputError(f"--num-gpus {args.num_gpus}: give 1 or more (on the CPU: processes)")
    if dist.is_torchelastic_launched():
        if args.num_gpus != 1:
            raise InputError(
                f"--num-gpus {args.num_gpus}: torchrun starts the processes; leave it out, "
                "and give torchrun --nproc-per-node"
            )
        return
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > 1 and not device.startswith("cuda"):
        raise InputError(
            f"--num-gpus {args.num_gpus} with MODEL.DEVICE (train.device) {device}: set "
            "CUDA_VISIBLE_DEVICES to '' for several processes on the CPU of a machine with GPUs"
        )
    if 0 < gpus < args.num_gpus:
        raise InputError(f"--num-gpus {args.num_gpus}: this machine has {gpus}")
    if not _DIST_URL.match(args.dist_url):
        raise InputError(
            f"--dist-url {args.dist_url}: allowed: tcp://HOST:PORT, file:///PATH, auto"
        )
    local = ("tcp://127.0.0.1:", "tcp://localhost:", "auto")
    if args.num_machines > 1 and args.dist_url.startswith(local):
        raise InputError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, an address of "
            "machine 0 that all of them reach"
        )


def check_batch(images: int, parts: int, *, key: str, of: str) -> None:
    """
    Args:
        images: of a step, over all processes.
        parts: micro-batches of a step, of all processes.
        key: that says `images`, for the message.
        of: what makes `parts`, for the message.

    Raises:
        InputError: a micro-batch would have no image, or a fraction of one.
    """
    if images < 1 or images % parts:  # of batches without images, Detectron2 never gets one
        raise InputError(f"{key} {images}, the images of a step, does not divide by {parts} ({of})")


def count_processes(args: argparse.Namespace) -> int:
    """Those of all machines.

    Args:
        args: with `num_gpus` and `num_machines`.
    """
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    return args.num_gpus * args.num_machines


def starts_the_run() -> bool:
    """False in all but one process of a machine, under torchrun: the checks are made once."""
    return int(os.getenv("LOCAL_RANK", "0")) == 0 or not dist.is_torchelastic_launched()


def is_first_process(args: argparse.Namespace) -> bool:
    """Whether this is, or will start, the main process of all machines.

    Args:
        args: with `machine_rank`.
    """
    rank = os.environ["RANK"] if dist.is_torchelastic_launched() else args.machine_rank
    return int(rank) == 0


def launch(main: Callable[..., Any], args: argparse.Namespace, *more: Any, device: str) -> None:
    """Runs `main(args, *more)` in every process of this machine.

    Under torchrun this is one of them already. Otherwise Detectron2's launch starts them; when one
    dies, the others are stopped, and its traceback is raised here. SIGTERM and SIGINT are passed
    on.

    Args:
        args: of :func:`rope_vit_det.engine.command_line.argument_parser`.
        device: of the model, "cpu" or "cuda".

    Raises:
        InputError: raised in a process.
        RunError: raised in a process, or one was killed.
    """
    try:
        if dist.is_torchelastic_launched():
            _run_under_torchrun(main, args, *more, device=device)
            return
        with signals_passed_on() if count_processes(args) > 1 else nullcontext():
            detectron2_launch(
                _in_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                # Detectron2's default is one port for all runs of a user.
                dist_url=args.dist_url if args.num_machines > 1 else "auto",
                args=(main, args, *more),
            )
    except (ProcessRaisedException, InputError) as error:
        # All that is left of another process's exception, or of a loader worker's, is its traceback
        # as a text.
        last = str(error).strip().splitlines()[-1]
        kinds: list[type[Exception]] = [InputError, RunError, *RunError.__subclasses__()]
        for kind in kinds:
            name = f"{kind.__module__}.{kind.__name__}: "
            if type(error) is kind or last.startswith(name):
                raise kind(last.removeprefix(name)) from None
        raise
    except ProcessExitedException as error:
        raise RunError(f"{error}; the other processes ended too; go on with --resume") from None


def gather_numbers(numbers: Sequence[float], device: str) -> list[list[float]]:
    """The numbers of all processes, in all of them; one collective of one size.

    Args:
        numbers: of this process, up to 256; other processes may have more or fewer.
        device: type of the one that the processes' backend is for.

    Returns:
        For every place the numbers of all processes at it, 0 where one has none.
    """
    world = comm.get_world_size()
    if world == 1:
        return [[float(number)] for number in numbers]
    own = torch.zeros(_MAX_NUMBERS, dtype=torch.float64)
    own[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.zeros_like(own, device=device) for _ in range(world)]
    dist.all_gather(rows, own.to(device))
    return torch.stack(rows, 1).tolist()


def wrap_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """The model under :class:`DistributedDataParallel` where there are several processes.

    Detectron2's `create_ddp_model` alone names a GPU, and fails on the CPU. Unused parameters are
    looked for in a walk over the graph of every step, unless it is known that there are none.

    Args:
        kwargs: of `create_ddp_model`.
    """
    options = {"broadcast_buffers": False, "find_unused_parameters": True} | kwargs
    all_used = uses_all_parameters(model)
    if all_used is not None:
        options["find_unused_parameters"] = not all_used
    if next(model.parameters()).device.type != "cuda":
        options.setdefault("device_ids", None)
    return create_ddp_model(model, **options)


def _run_under_torchrun(
    main: Callable[..., Any], args: argparse.Namespace, *more: Any, device: str
) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps its store over restarts, with the addresses of processes that are gone.
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.getenv('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    group = {"store": store, "rank": rank, "world_size": world, "timeout": DEFAULT_TIMEOUT}
    dist.init_process_group("nccl" if on_gpu else "gloo", **group)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        with peers_watched():
            main(args, *more)  # in as many threads as torchrun, or OMP_NUM_THREADS, says
    finally:
        dist.destroy_process_group()


def _in_process(main: Callable[..., Any], args: argparse.Namespace, *more: Any) -> None:
    print_any_text()
    if comm.get_world_size() > 1 and not torch.cuda.is_available():
        # Each would take all cores otherwise.
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
    with peers_watched():
        main(args, *more)


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

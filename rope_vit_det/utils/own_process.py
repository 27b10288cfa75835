"""Work in a process that is gone afterwards, with all that it took, and may die alone."""

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import InputError, RunError


def in_own_process(work: Callable[[], Any], name: str, device: str = "cpu") -> Any:
    """What a function returns in a process of its own.

    Forked, so that it knows what the script has registered; spawned where that cannot be.

    Args:
        work: to be pickled, as is what it returns, in which are no tensors.
        name: of the work, for the message.
        device: that it uses.

    Raises:
        InputError: it did.
        RunError: it did, or the process died.
    """
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(sender, work, device, method), daemon=True)
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            process.join()
            status = process.exitcode
            raise RunError(f"the process of {name} ended with exit status {status}") from None
        process.join()
        if answer is not None:
            break
    result, error = answer
    if error:
        raise error
    return result


def _answer(sender: Connection, work: Callable[[], Any], device: str, method: str) -> None:
    """Sends a result and an error, of which there is one; None: in a fork nothing works here."""
    try:
        if method == "fork":
            gc.freeze()  # what was there before, such as a thread pool, cannot be taken down here
            torch.set_num_threads(1)  # OpenMP's threads are not forked
            torch.zeros(1, device=device, requires_grad=True).sum().backward()
    except RuntimeError:  # CUDA, or autograd's threads, were in use before
        sender.send(None)
        return
    try:
        sender.send((work(), None))
    except (InputError, RunError) as error:
        sender.send((None, error))

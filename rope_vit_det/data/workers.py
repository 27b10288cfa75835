"""Loader workers and the signals that end a run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_LOOK_FOR_THE_PARENT = 5.0  # seconds


class ShieldedLoader:
    """A loader whose workers ignore SIGTERM and SIGINT, unless their own process sends SIGTERM.

    Batch systems and terminals signal every process of a run; the training needs its workers for
    the iteration that it finishes. When their process dies, they end.
    """

    def __init__(self, loader: DataLoader) -> None:
        """
        Args:
            loader: without a `worker_init_fn`; gets one.
        """
        self.loader = loader
        loader.worker_init_fn = _ignore_signals

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that is only being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # Workers inherit what is blocked, and may take seconds until they come to `worker_init_fn`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker_id: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # Not os.getppid(): the parent may be dead already.
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_wait_for_the_parents, args=(parent,), daemon=True).start()


def _wait_for_the_parents(parent: int) -> None:
    while os.getppid() == parent:
        # Python's handlers, unlike this, do not say who sent it.
        received = signal.sigtimedwait(_SIGNALS, _LOOK_FOR_THE_PARENT)
        if received and received.si_pid == parent and received.si_signo == signal.SIGTERM:
            break
    os._exit(0)

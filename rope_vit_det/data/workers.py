"""Loader workers and the signals that end a run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
# Some platforms cannot ask who sent a signal; there the workers ignore SIGINT, a terminal's Ctrl-C.
_CAN_ASK = hasattr(signal, "pthread_sigmask") and hasattr(signal, "sigtimedwait")
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
        if not _CAN_ASK:
            return iter(self.loader)
        # Workers inherit what is blocked, and may take seconds until they come to `worker_init_fn`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker_id: int) -> None:
    if not _CAN_ASK:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return  # torch's own watchdog ends the worker when its parent is gone
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_wait_for_the_parents, daemon=True).start()


def _wait_for_the_parents() -> None:
    # Not os.getppid(): the parent may be dead already.
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    # Under forkserver the system's parent is the server. Elsewhere its pid is the better sign: what
    # `is_alive` waits for to close is inherited by workers that were forked later.
    by_server = getattr(multiprocessing.current_process(), "_start_method", "") == "forkserver"
    while parent.is_alive() if by_server else os.getppid() == parent.pid:
        # Python's handlers, unlike this, do not say who sent it.
        received = signal.sigtimedwait(_SIGNALS, _LOOK_FOR_THE_PARENT)
        if received and received.si_pid == parent.pid and received.si_signo == signal.SIGTERM:
            break
    os._exit(0)

"""Loader workers and the signals that end a run."""

import os
import signal
import threading

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def ignore_signals(worker_id: int = 0) -> None:
    """Makes a loader worker ignore SIGTERM and SIGINT, unless its own process sends SIGTERM.

    Batch systems and terminals signal every process of a run; the training needs its workers for
    the iteration that it finishes. A `worker_init_fn` of :class:`DataLoader`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_wait_for_the_parents, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_parents(parent: int) -> None:
    while True:
        # Python's handlers, unlike this, do not say who sent it.
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)

"""SIGTERM and SIGINT as a request to stop after the iteration at hand."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# How the process that started the others passes a signal on: a terminal's Ctrl-C, or a batch
# system, may have sent it to them already, and theirs must not count as a second one. Not every
# platform has it.
_PASSED_ON = getattr(signal, "SIGUSR1", None)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes the first SIGTERM or SIGINT while it is entered; the second ends the process at once.

    Outside the main thread it notes nothing.
    """

    signal: str | None = None  # the name of the one that was noted
    in_any_process = False  # whether one has a signal, as far as they have agreed
    _received = 0

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = filter(None, (*_SIGNALS, _PASSED_ON))
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != _PASSED_ON:
            self._received += 1
            if self._received > 1:
                os._exit(128 + number)
        if self.signal is None:
            self.signal = "the signal" if number == _PASSED_ON else signal.Signals(number).name
            os.write(2, f"{self.signal}: stopping after this iteration\n".encode())


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """For the process that starts the others: passes the first SIGTERM or SIGINT on to them.

    The second one kills them and ends this process at once.
    """
    received = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in multiprocessing.active_children():
            if len(received) > 1:
                process.kill()
            elif process.pid:
                os.kill(process.pid, _PASSED_ON or number)
        if len(received) > 1:
            os._exit(128 + number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

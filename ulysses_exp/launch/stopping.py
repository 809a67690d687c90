"""Being asked to stop: the signals that mean "save a checkpoint now, then end", in the command and in its ranks.

Batch systems send one of these before they take a machine away, to the command alone or to every process of the job.
Ctrl-C is none of them: it ends a job at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

#: With this one the parent passes the request on to its ranks.
TO_RANKS = signal.SIGUSR1


class Stopped(Exception):
    """In a rank: training has ended where it was asked to; the checkpoint is on disk."""

    def __init__(self, checkpoint: str, step: int):
        super().__init__(f"stopped after step {step}")
        self.checkpoint, self.step = checkpoint, step


class Requests:
    """The requests that this process has got."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the first one
        self._deferred = False

    def _arrived(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number).name
        if again or not self._deferred:
            raise KeyboardInterrupt(self.signal)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """In the command: a request interrupts (KeyboardInterrupt with the signal's name), unless it is `deferred`.

        What the user has had ignored (nohup) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._arrived)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A first request is only noted, in `signal`; the second one interrupts."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def note(self) -> None:
        """In a rank: requests are noted and nothing else; the parent ends a rank that does not stop."""
        self.signal = None
        for number in SIGNALS:
            signal.signal(number, self._noted)

    def _noted(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name


#: Of this process.
requests = Requests()

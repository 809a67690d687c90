"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it started ends, results.json says so."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Within, both raise KeyboardInterrupt in the main thread, where they would have ended the process at once.

    A handler that is set already stays, and so does a signal that is ignored (nohup). Does nothing in another thread.
    """
    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)

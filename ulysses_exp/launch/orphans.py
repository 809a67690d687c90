"""No process of a job outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_forked_by: int | None = None


def _remember() -> None:
    global _forked_by
    _forked_by = os.getpid()


os.register_at_fork(before=_remember)


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when the thread that started it ends, also by SIGKILL.

    Called in the server that ranks are forks of, in each of its forks, and in what a launcher has started. Ends the
    process at once where the parent is gone already.

    Args:
        parent: the process that is to be alive; None takes the one that forked this process, if it is known.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent if parent is not None else _forked_by
    if parent is not None and os.getppid() != parent:
        os._exit(1)

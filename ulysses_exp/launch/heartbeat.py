"""How far a rank is: written by the rank as it goes, read by the process that watches it.

A few bytes in a file that both have mapped, so a beat costs about a microsecond, and the last one is there also when
the rank cannot answer any more.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = struct.Struct("<dQq32s")  # when, how many beats so far, step, phase
NO_STEP = -1


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    time: float  # seconds, of the clock that `now` reads
    count: int
    step: int  # optimizer steps made, NO_STEP where the phase has none
    phase: str

    def __str__(self) -> str:
        return f"at step {self.step} ({self.phase})" if self.step != NO_STEP else f"while {self.phase}"


def now() -> float:
    """Seconds since the machine started, the same for all of its processes."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class _Writer:
    def __init__(self, path: Path):
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.count, self.step, self.phase = 0, NO_STEP, b""

    def write(self) -> None:
        self.count += 1
        _LAYOUT.pack_into(self._page, 0, now(), self.count, self.step, self.phase)


_writer: _Writer | None = None


def path_of(folder: Path, rank: int) -> Path:
    """Where `rank` of the task with `folder` leaves its beats."""
    return folder / f"heartbeat-rank{rank}"


def start(folder: Path, rank: int) -> None:
    """This process is `rank` from now on."""
    global _writer
    _writer = _Writer(path_of(folder, rank))
    beat()


def beat(phase: str | None = None, step: int | None = None) -> None:
    """A sign of life. Does nothing in a process that is no rank.

    Args:
        phase: what begins, a participle such as `building`; resets the step.
        step: the optimizer step that goes on.
    """
    if _writer is None:
        return
    if phase is not None:
        _writer.phase, _writer.step = phase.encode()[:32], NO_STEP
    if step is not None:
        _writer.step = step
    _writer.write()


def last(folder: Path, rank: int) -> Beat | None:
    """The last beat of `rank`; None where it has not begun."""
    try:
        data = path_of(folder, rank).read_bytes()
    except OSError:
        return None
    if len(data) < _LAYOUT.size:
        return None
    when, count, step, phase = _LAYOUT.unpack(data)
    return Beat(when, count, step, phase.rstrip(b"\0").decode(errors="replace")) if count else None

"""Ranks that stand still: which one, since when, and where."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ulysses_exp.launch import heartbeat
from ulysses_exp.launch.failure import Cause, RankFailure, waited_for_nccl
from ulysses_exp.launch.heartbeat import Beat
from ulysses_exp.launch.server import Fork

#: On this signal a rank writes down where it is.
SHOW_STACK = signal.SIGRTMIN + 3

#: A rank that uses less of a core than this, and gives no sign of life, waits for something.
IDLE = 0.02

_NOT_STARTED = -1  # beats of a rank whose server is still importing

_STACK_SECONDS = 2  # for all ranks to write theirs
_FRAME = re.compile(r'^  File "(.*)", line (\d+),? in (.*)$')  # of faulthandler, and of a traceback
_COLLECTIVE = re.compile(r"/torch/distributed/distributed_c10d\.py$")
_OURS = re.compile(r"/(ulysses_exp/.*)$")
_TICKS = os.sysconf("SC_CLK_TCK")


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stack"


def show_stack_on_signal(folder: Path, rank: int) -> None:
    """In a rank: from now on SHOW_STACK has all its threads' Python stacks written, whatever it does at that time."""
    file = _stack_file(folder, rank).open("w")
    faulthandler.register(SHOW_STACK, file=file, all_threads=True)
    _kept.append(file)


_kept: list[object] = []  # faulthandler knows the number of the file only


@dataclass
class _Seen:
    """A rank's processor time when its last beat was first seen; before it was started, that of the server."""

    count: int
    cpu: float
    since: float


class Watch:
    """Looks at the ranks of a task from time to time.

    A rank stands still when for `timeout_s` it has neither given a sign of life nor used its core, or is stopped. A
    rank that computes for longer than that between two signs of life does not.
    """

    def __init__(self, folder: Path, timeout_s: float):
        self.folder, self.timeout_s = folder, timeout_s
        self._seen: dict[int, _Seen] = {}

    def standing(self, forks: Mapping[int, Fork]) -> dict[int, float]:
        """Ranks that stand still, and for how many seconds."""
        found = {}
        for rank, fork in forks.items():
            if fork.exitcode is not None:
                continue
            state = _state(fork.server_pid if fork.pid is None else fork.pid)
            if state is None:
                continue
            letter, cpu = state
            beat = heartbeat.last(self.folder, rank)
            count = _NOT_STARTED if fork.pid is None else 0 if beat is None else beat.count
            seen = self._seen.get(rank)
            if seen is None or seen.count != count:
                self._seen[rank] = seen = _Seen(count, cpu, heartbeat.now())
            still = heartbeat.now() - seen.since
            if still > self.timeout_s and (letter in "Tt" or cpu - seen.cpu < IDLE * still):
                found[rank] = still
        return found

    def failure(self, forks: Mapping[int, Fork], standing: Mapping[int, float]) -> RankFailure:
        """The failure to report, and in its trace where every rank is. `forks` are all alive ones, `standing` may be
        empty: then a rank has failed since it waited too long."""
        if late := [rank for rank in standing if forks[rank].pid is None]:
            seconds = max(standing[rank] for rank in late)
            text = f"the process that starts ranks stands still since {seconds:.0f} s: it does not end importing"
            return RankFailure(None, text, cause=Cause.STANDS_STILL)
        stacks = _stacks(self.folder, forks)
        places = {rank: Place.of(self.folder, rank, fork, stacks.get(rank, "")) for rank, fork in forks.items()}
        since = {rank: self._seen[rank].since for rank in forks if rank in self._seen}
        guilty = min(places, key=lambda r: (*places[r].innocence, since.get(r, 0.0), r))
        seconds = standing.get(guilty, heartbeat.now() - since.get(guilty, heartbeat.now()))
        text = f"stands still since {seconds:.0f} s: {places[guilty]}"
        others = [f"rank {rank} {place}" for rank, place in places.items() if rank != guilty]
        if len(others) > 3:
            others = [*others[:3], f"{len(others) - 3} more are in run.log"]
        trace = "\n".join(
            f"rank {rank}: {place}\n{stacks.get(rank) or '(no stack: it does not answer)'}"
            for rank, place in places.items()
        )
        cause = Cause.OTHERS if places[guilty].innocence[0] == 2 else Cause.STANDS_STILL
        return RankFailure(guilty, "; ".join([text, *others]), trace, cause)


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    beat: Beat | None
    letter: str  # the kernel's: T stopped, D waits for a disk or a device, R runs, S sleeps
    collective: str | None  # in which it waits
    line: str | None  # of this project

    @staticmethod
    def of(folder: Path, rank: int, fork: Fork, stack: str) -> Place:
        state = _state(fork.pid) if fork.pid is not None else None
        collective, line = _in_words(stack)
        return Place(heartbeat.last(folder, rank), state[0] if state else "?", collective, line)

    @property
    def innocence(self) -> tuple[int, int]:
        """Of the ranks that stand still, the one with the least is why: a stopped one, then one that is not waiting
        for others, then the one that is least far."""
        kind = 0 if self.letter in "Tt" else 1 if self.collective is None else 2
        return kind, self.beat.count if self.beat else 0

    def __str__(self) -> str:
        at = str(self.beat) if self.beat else "before it began"
        where = f" at {self.line}" if self.line else ""
        if self.letter == "T":
            return f"stopped by a signal (SIGSTOP), {at}"
        if self.letter == "t":
            return f"stopped by a debugger, {at}"
        if self.letter == "D":
            return f"waits for a disk or a device{where}, {at}"
        if self.collective:
            return f"waits in {self.collective}{where}, {at}"
        return f"is{where or ' at an unknown place'}, {at}"


def _in_words(stack: str) -> tuple[str | None, str | None]:
    """(collective, line of this project) of the thread that waits for others, else of the main thread.

    faulthandler writes the main thread last; on a GPU the backward pass is in another.
    """
    threads = [_of_thread(thread) for thread in reversed(stack.strip().split("\n\n"))]
    return next((thread for thread in threads if thread[0]), threads[0])


def waited_in(trace: str) -> str:
    """Where a rank was that has given up waiting, from its traceback or from what NCCL said."""
    if waited := waited_for_nccl(trace):
        return waited
    collective, line = _of_thread("\n".join(reversed(trace.splitlines())))
    return f"waited in {collective or 'a collective'}{f' at {line}' if line else ''}"


def _of_thread(stack: str) -> tuple[str | None, str | None]:
    collective = None
    for text in stack.splitlines():
        if not (match := _FRAME.match(text)):
            continue
        file, number, function = match.groups()
        if _COLLECTIVE.search(file) and not function.startswith("_"):
            collective = function
        if (ours := _OURS.search(file)) and not ours[1].endswith("metrics/communication.py"):
            return collective, f"{ours[1]}:{number}"
    return collective, None


def _stacks(folder: Path, forks: Mapping[int, Fork]) -> dict[int, str]:
    """What each rank that answers has written."""
    asked = {}
    for rank, fork in forks.items():
        state = _state(fork.pid) if fork.pid is not None else None
        if state is not None and state[0] not in "TtDZ" and heartbeat.last(folder, rank) is not None:
            asked[rank] = _size(_stack_file(folder, rank))
            fork.send(SHOW_STACK)
    end = time.monotonic() + _STACK_SECONDS
    read: dict[int, str] = {}
    whole: set[int] = set()
    while len(whole) < len(asked) and time.monotonic() < end:
        time.sleep(0.1)
        for rank, before in asked.items():
            text = _text(_stack_file(folder, rank))[before:]
            if text and text == read.get(rank):
                whole.add(rank)
            read[rank] = text
    return read


def _size(path: Path) -> int:
    return len(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, float] | None:
    """(the kernel's letter, processor seconds so far); None where the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[0], (int(fields[11]) + int(fields[12])) / _TICKS

"""Ranks on this machine: forks of a warm server, which meet through a file.

torch's `elastic_launch` would add a rendezvous, whose TCPStore listens on all interfaces and which one machine does
not need.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ulysses_exp.config import device_of
from ulysses_exp.launch.environment import prepare as prepare_environment
from ulysses_exp.launch.failure import RankFailure
from ulysses_exp.launch.rank import be_rank
from ulysses_exp.launch.server import Fork, ServerEnded, server
from ulysses_exp.launch.supervision import prepare, supervise
from ulysses_exp.launch.task import Task

if TYPE_CHECKING:
    from torch.distributed import Store


class LocalRanks:
    """Starts the ranks of each task afresh; imports are paid once a process, by the server."""

    def run(self, task: Task) -> None:
        """Runs `task`. Raises RankFailure, KeyboardInterrupt."""
        prepare(task)
        start = task.config.launch.start
        warm_up(device_of(task.config), start)
        meeting, world = task.results / "meeting", task.layout.world
        forks: dict[int, Fork] = {}
        try:
            for rank in range(world):
                forks[rank] = server(start).fork(_rank, task, rank, meeting)
        except ServerEnded as ended:
            raise RankFailure(None, str(ended)) from None
        try:
            supervise(task, forks)
        finally:
            meeting.unlink(missing_ok=True)

    def close(self) -> None:
        """The server ends with this process."""


def warm_up(device: str, start: str = "fork") -> None:
    """Starts the server, which imports what ranks need while this process goes on. Does nothing the second time."""
    prepare_environment(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens beyond this machine
    server(start)


def _rank(task: Task, rank: int, meeting: Path) -> None:
    world = task.layout.world
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))

    def meet() -> Store:
        from torch.distributed import FileStore

        return FileStore(str(meeting), world)

    be_rank(task, rank, meet)


__all__ = ["LocalRanks", "RankFailure", "warm_up"]

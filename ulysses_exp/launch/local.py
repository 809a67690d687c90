"""Ranks on this machine: forks of a warm server, watched by torch elastic's process context.

torch's `elastic_launch` would add a rendezvous, whose TCPStore listens on all interfaces and which one machine does
not need; its `start_processes` alone gives the supervision. Ranks meet through a file.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
from pathlib import Path

from ulysses_exp.config import device_of
from ulysses_exp.launch.environment import prepare
from ulysses_exp.launch.failure import RankFailure, first_failure
from ulysses_exp.launch.orphans import OWNER
from ulysses_exp.launch.task import Task

_POLL_SECONDS = 0.02


class LocalRanks:
    """Starts the ranks of each task afresh; imports are paid once a process, by the forkserver."""

    def run(self, task: Task) -> None:
        """Runs `task`. Raises RankFailure, KeyboardInterrupt."""
        task.results.mkdir(parents=True, exist_ok=True)
        warm_up(device_of(task.config))
        from torch.distributed.elastic.multiprocessing import SignalException, start_processes

        from ulysses_exp.launch.rank_logs import RankLogs

        for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the failing rank is reported once, by us
        meeting = task.results / "meeting"
        meeting.unlink(missing_ok=True)
        world = task.layout.world
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
        ranks = None
        try:
            ranks = start_processes(
                name="rank",
                entrypoint=_rank,
                args=dict.fromkeys(range(world), (task, meeting)),
                envs={rank: _environment(rank, world) for rank in range(world)},
                logs_specs=RankLogs(task.results, world),
                start_method="forkserver",
            )
            outcome = ranks.wait(period=_POLL_SECONDS)
        except SignalException as stop:
            raise KeyboardInterrupt(signal.Signals(stop.sigval).name) from None
        finally:
            exitcodes = _exitcodes(ranks)
            if ranks is not None:
                ranks.close(signal.SIGKILL)
            meeting.unlink(missing_ok=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if outcome is None or outcome.is_failed():
            raise first_failure(task.results, outcome_codes(outcome, exitcodes))

    def close(self) -> None:
        """The forkserver ends with this process."""


def outcome_codes(outcome, exitcodes: dict[int, int | None]) -> dict[int, int | None]:
    """Exit codes by rank, without those of ranks that torch ended (SIGTERM) because another had failed."""
    failed = set(outcome.failures) if outcome is not None else set()
    return {r: c for r, c in exitcodes.items() if r in failed or c != -signal.SIGTERM}


def _exitcodes(ranks) -> dict[int, int | None]:
    processes = ranks._pc.processes if ranks is not None and ranks._pc is not None else []
    return {rank: process.exitcode for rank, process in enumerate(processes)}


def _environment(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def warm_up(device: str) -> None:
    """Starts the forkserver that imports what ranks need, while this process goes on. Does nothing the second time."""
    prepare(device)
    os.environ[OWNER] = str(os.getpid())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens beyond this machine
    multiprocessing.set_forkserver_preload(["ulysses_exp.preload"])
    multiprocessing.forkserver.ensure_running()
    del os.environ[OWNER]  # other programs that this process starts have forkservers of their own


def _rank(task: Task, meeting: Path) -> None:
    from torch.distributed import FileStore

    from ulysses_exp.worker import run

    run(task, int(os.environ["RANK"]), FileStore(str(meeting), task.layout.world))


__all__ = ["LocalRanks", "RankFailure", "warm_up"]

"""Four gloo ranks, started once and asked many times: real processes and collectives, milliseconds a check."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

# before the first rank: one thread each, loopback only
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORLD = 4


@dataclass(frozen=True)
class Failed:
    """What a rank raised, or that it did not answer in time (`error` is then 'TimeoutError')."""

    error: str
    message: str = ""
    where: str = field(default="", compare=False)


class RankPool:
    """Runs module-level functions `function(rank, *args)` on every rank.

    A check whose ranks part ways (an error on some of them only, or a hang) costs a restart.
    """

    def __init__(self, folder: Path):
        self.folder, self.starts = folder, 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ulysses_exp.rank.preload", "ulysses_exp.model.attention"])
        self.starts += 1
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, str(self.folder / f"store{self.starts}"), there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What each rank returned, or Failed."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        found: dict[int, Any] = {}
        until = time.monotonic() + timeout
        while len(found) < WORLD and time.monotonic() < until:
            open_pipes = [p for i, p in enumerate(self.pipes) if i not in found]
            for pipe in wait(open_pipes, timeout=until - time.monotonic()):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    found[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = Failed("EOFError", "the rank died")
        results = [found.get(rank, Failed("TimeoutError")) for rank in range(WORLD)]
        if len({type(r) is Failed and (r.error, r.message) for r in results}) > 1 or len(found) < WORLD:
            self.stop()
        return results

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What each rank returned.

        Raises:
            AssertionError: a rank failed.
        """
        results = self.outcomes(function, *args, timeout=timeout)
        failed = {rank: r for rank, r in enumerate(results) if isinstance(r, Failed)}
        assert not failed, f"{function.__name__}: {failed}"
        return results


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import deepspeed
    import torch

    from ulysses_exp.rank.upstream import without_operators_of_its_own

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # deepspeed.initialize asks for it
    without_operators_of_its_own()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the test session is over
            return
        try:
            pipe.send(function(rank, *args))
        except BaseException as error:
            pipe.send(Failed(type(error).__name__, str(error), traceback.format_exc()[-600:]))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()

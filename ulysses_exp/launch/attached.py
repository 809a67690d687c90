"""Ranks that torchrun, srun or the deepspeed launcher has started: this command runs once in each of them.

Rank 0 is also the parent: it alone composes the configuration and owns the output folder. The others wait on the
launcher's store for tasks. A task that needs fewer ranks runs on the first ones.

The store listens on the launcher's network, and anybody there can write to it. So a task comes as data, never as a
pickle, and what would let code in has to be in the command of the rank itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

from ulysses_exp.config import Config, doors
from ulysses_exp.launch.environment import prepare
from ulysses_exp.launch.failure import RankFailure, first_failure
from ulysses_exp.launch.task import Task

_IDLE = timedelta(days=7)  # ranks wait this long for the next task; they die with their launcher before
_END = b"end"


def _environment() -> tuple[int, int]:
    """(rank, world size), read as torchrun or else as Slurm tells them."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank], os.environ[world]
            os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
            return int(os.environ[rank]), int(os.environ[world])
    raise RankFailure(0, "launch=attached needs RANK and WORLD_SIZE: start with torchrun, or set launch=local")


def _store(rank: int, world: int):
    from torch.distributed import rendezvous

    prepare("auto")
    import ulysses_exp.preload  # noqa: F401  what ranks need, and the environment that it wants

    store, _, _ = next(rendezvous("env://", rank, world, timeout=_IDLE))
    return store


class AttachedRanks:
    """Rank 0's view: hands out tasks and takes part in them."""

    def __init__(self) -> None:
        self.rank, self.world = _environment()
        self.store = _store(self.rank, self.world)
        self.number = 0

    def run(self, task: Task) -> None:
        """Runs `task` on the first ranks. Raises RankFailure."""
        if task.layout.world > self.world:
            raise RankFailure(0, f"{task.layout} needs {task.layout.world} ranks, {self.world} are attached")
        task.results.mkdir(parents=True, exist_ok=True)
        self.number += 1
        self.store.set(f"task{self.number}", task.to_json())
        _take_part(self.store, self.number, task, 0)
        failed = [r for r in range(task.layout.world) if self.store.get(f"done{self.number}/{r}") != b"ok"]
        if failed:
            raise first_failure(task.results, dict.fromkeys(failed, 1))

    def close(self) -> None:
        """Lets the other ranks go."""
        self.store.set(f"task{self.number + 1}", _END)


def serve(own: Callable[[], Config]) -> int:
    """What every rank but 0 does: tasks, until there are no more. Returns the exit code.

    Args:
        own: the configuration that this process was started with; asked for where a task needs its user's trust.
    """
    rank, world = _environment()
    store = _store(rank, world)
    number = 1
    while (message := store.get(f"task{number}")) != _END:
        try:
            task = Task.from_json(message)
            _check_doors(task, own)
        except ValueError as error:
            print(f"rank {rank}: no task of this job: {error}", file=sys.stderr)
            return 1
        if rank < task.layout.world:
            _take_part(store, number, task, rank)
        number += 1
    return 0


def _check_doors(task: Task, own: Callable[[], Config]) -> None:
    """Raises ValueError where `task` opens a door that this rank's own command keeps closed."""
    asked = {key: _setting(task.config, key) for key, opens in doors().items() if opens(_setting(task.config, key))}
    if task.options.get("trust_pickle"):
        asked["checkpoint.trust_pickle"] = True
    asked.pop("tracker.mode", None)  # ranks talk to no tracker
    if asked:
        mine = own()
        for key, value in asked.items():
            if _setting(mine, key) != value:
                raise ValueError(f"it asks for {key}={value}, which the command of this rank does not give")


def _setting(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _take_part(store, number: int, task: Task, rank: int) -> None:
    from torch.distributed import PrefixStore

    from ulysses_exp.worker import run

    try:
        run(task, rank, PrefixStore(f"group{number}", store))
        outcome = b"ok"
    except Exception as error:  # recorded by `run`; the next task may go well
        print(f"rank {rank}: {error}", file=sys.stderr)
        outcome = b"failed"
    store.set(f"done{number}/{rank}", outcome)

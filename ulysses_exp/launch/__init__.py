"""How ranks start. Each launcher runs one task after another on as many ranks as its layout needs."""

from __future__ import annotations

from typing import Protocol

from ulysses_exp.config import Config
from ulysses_exp.launch.failure import RankFailure
from ulysses_exp.launch.task import Task

__all__ = ["RankFailure", "Ranks", "Task", "open_ranks"]


class Ranks(Protocol):
    """Runs tasks on ranks."""

    def run(self, task: Task) -> None:
        """Returns when all ranks are done. Raises RankFailure for the first rank that failed."""

    def close(self) -> None:
        """Lets go of whatever waits for the next task."""


def open_ranks(config: Config) -> Ranks:
    """The launcher that `launch` names; imports torch only now."""
    if config.launch.name == "attached":
        from ulysses_exp.launch.attached import AttachedRanks

        return AttachedRanks(config.launch)
    if config.launch.name == "slurm":
        from ulysses_exp.launch.slurm import SlurmRanks

        return SlurmRanks(config.launch)
    from ulysses_exp.launch.local import LocalRanks

    return LocalRanks()

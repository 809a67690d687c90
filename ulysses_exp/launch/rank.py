"""What a fork of the server does to become a rank, before it imports anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ulysses_exp.config.stages import resolve
from ulysses_exp.launch import failure, heartbeat, standstill, stopping
from ulysses_exp.launch.task import Task

if TYPE_CHECKING:
    from torch.distributed import Store


#: What a rank runs, by name: this folder knows how ranks start, and nothing of what they do
WORKER = "ulysses_exp.rank.worker:run"


def be_rank(task: Task, rank: int, meet: Callable[[], Store]) -> None:
    """Does `task` as `rank`. `meet` connects to where the ranks meet. Ends the process where something fails."""
    stopping.requests.note()
    redirect_output(task.results, rank)
    heartbeat.start(task.results, rank)
    standstill.show_stack_on_signal(task.results, rank)
    try:
        run = resolve(WORKER)
        run(task, rank, meet())
    except BaseException as error:
        failure.record(task.results, rank, error)  # the first record stands
        raise


def redirect_output(folder: Path, rank: int) -> None:
    """What a rank prints goes into the run folder, `rank0.log` and `rank0.err`, never onto the user's terminal."""
    for number, (stream, name) in enumerate(((sys.stdout, "log"), (sys.stderr, "err")), 1):
        if stream is not None:  # the user has closed it
            stream.flush()
        with (folder / f"rank{rank}.{name}").open("wb") as file:
            os.dup2(file.fileno(), number)

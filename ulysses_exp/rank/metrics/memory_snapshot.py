"""`memory.snapshot`: what CUDA's allocator did until memory ran out, for pytorch.org/memory_viz."""

from __future__ import annotations

import contextlib

import torch

from ulysses_exp.config import device_of
from ulysses_exp.launch import failure
from ulysses_exp.launch.task import Task

#: Allocations and frees that are kept, the last ones; each takes some KB of host memory with its stack
_MOST_ENTRIES = 100_000


def begin(task: Task) -> None:
    """From now on allocations are noted with their Python stacks, where the task wants that."""
    if _wanted(task):
        torch.cuda.memory._record_memory_history(max_entries=_MOST_ENTRIES, stacks="python")


def leave(task: Task, rank: int, error: BaseException) -> str | None:
    """Writes what was noted into the run folder where `error` is that memory ran out.

    Returns:
        The file's path in the run folder; None where there is none.
    """
    if not _wanted(task) or not failure.is_out_of_memory(error):
        return None
    path = task.results / f"memory-rank{rank}.pickle"
    with contextlib.suppress(OSError, RuntimeError):  # the error itself matters more
        torch.cuda.memory._dump_snapshot(str(path))
    return str(path.relative_to(task.folder)) if path.exists() else None


def _wanted(task: Task) -> bool:
    return task.config.memory.snapshot and device_of(task.config) == "cuda"

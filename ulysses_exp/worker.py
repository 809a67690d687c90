"""One rank: process group, session, work, results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ulysses_exp import strict_json
from ulysses_exp.config import device_of
from ulysses_exp.launch import failure
from ulysses_exp.launch.orphans import die_with_parent
from ulysses_exp.launch.task import Task
from ulysses_exp.memory_limit import held, limited
from ulysses_exp.session import Session, open_session
from ulysses_exp.stages import continuation, evaluate, longest, parity, reload, train

#: What a task can ask of a session; each returns a JSON-able dict, the same on every rank.
WORK: dict[str, Callable[[Session], dict[str, Any]]] = {
    "train": train.train,
    "eval": evaluate.evaluate,
    "continuation": continuation.continuation,
    "reload": reload.reload,
    "trajectory": parity.trajectory,
    "try_length": longest.try_length,
}


def run(task: Task, rank: int, store: dist.Store) -> None:
    """Does `task` as `rank`; the ranks meet through `store`. An error is left for the parent, then raised."""
    die_with_parent()
    try:
        torch.set_num_threads(_threads())
        with _process_group(task, rank, store), _session(task, rank) as session:
            if rank == 0:
                _leave(task.results / "session.json", session.describe())
            for work in task.work:
                result = WORK[work](session)
                if rank == 0:
                    _leave(task.results / f"{work}.json", result)
                if work == "train" and result["status"] != "ok":
                    break  # there is nothing to evaluate or to continue
    except BaseException as error:
        failure.record(task.results, rank, error)
        raise


@contextlib.contextmanager
def _session(task: Task, rank: int) -> Iterator[Session]:
    """The session, in no more memory than `options["memory_bytes"]` where the task has that."""
    before = held()
    with open_session(task, rank) as session:
        if (budget := task.options.get("memory_bytes")) is None:
            yield session
        else:
            with limited(session.device, budget, before):
                yield session


def _threads() -> int:
    """Ranks share the cores: one thread each unless the environment says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


@contextlib.contextmanager
def _process_group(task: Task, rank: int, store: dist.Store) -> Iterator[None]:
    device = device_of(task.config)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # DeepSpeed would build and use its shared-memory all-reduce: files in /dev/shm that stay (docs/findings.md)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=task.layout.world,
        timeout=timedelta(seconds=task.config.launch.timeout_s),
    )
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _leave(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` so that a reader sees all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(strict_json.dumps(result))
    temporary.replace(path)

"""One rank: process group, session, work, results."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ulysses_exp.config import device_of, stages
from ulysses_exp.config.redaction import redacted
from ulysses_exp.launch import failure, heartbeat, strict_json
from ulysses_exp.launch.environment import record_collectives
from ulysses_exp.launch.stopping import Stopped
from ulysses_exp.launch.task import Task
from ulysses_exp.model.attention import upstream
from ulysses_exp.rank.cores import bind_beside, threads
from ulysses_exp.rank.memory_limit import held, limited
from ulysses_exp.rank.metrics import memory_snapshot
from ulysses_exp.rank.session import Session, open_session
from ulysses_exp.rank.upstream import without_operators_of_its_own


def run(task: Task, rank: int, store: dist.Store) -> None:
    """Does `task` as `rank`; the ranks meet through `store`. An error is left for the parent, then raised.

    After an error nothing is taken down: others may be gone, and taking down would wait for them.
    """
    torch.set_num_threads(threads(device_of(task.config)))
    with contextlib.ExitStack() as built:
        try:
            heartbeat.beat("connecting")
            built.enter_context(process_group(task, rank, store))
            memory_snapshot.begin(task)
            heartbeat.beat("building")
            session = None
            if any(stages.work(work).session for work in task.work):
                session = built.enter_context(_session(task, rank))
                if rank == 0:
                    _leave(task.results / "session.json", session.describe())
            for work in task.work:
                part = stages.work(work)
                heartbeat.beat(part.doing)
                function = stages.resolve(part.function)
                result = function(session) if part.session else function(task, rank)
                if rank == 0:
                    _leave(task.results / f"{work}.json", result)
                if part.needed and result["status"] != "ok":
                    break  # there is nothing to evaluate or to continue
            heartbeat.beat("ending")
        except Stopped as stopped:
            if rank == 0:
                _leave(task.results / "stopped.json", {"checkpoint": stopped.checkpoint, "step": stopped.step})
        except BaseException as error:
            failure.record(task.results, rank, error, memory_snapshot.leave(task, rank, error))
            _left_standing.append(built.pop_all())
            trace = "".join(traceback.format_exception(error))
            if redacted(trace) != trace:  # whoever started this rank would write the error down as it is
                raise RuntimeError(f"see {task.results / f'error-rank{rank}.json'}") from None
            raise


_left_standing: list[contextlib.ExitStack] = []  # collected, they would be taken down


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


@contextlib.contextmanager
def process_group(task: Task, rank: int, store: dist.Store) -> Iterator[None]:
    device = device_of(task.config)
    if device == "cuda":
        if task.config.memory.expandable_segments:  # read when CUDA starts, which it has not in this process
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        record_collectives(task.results)
        torch.cuda.set_device(_gpu(task.config.launch.backend))
        bind_beside(torch.cuda.current_device())
    timeout = timedelta(seconds=task.config.launch.timeout_s)
    store.set_timeout(timeout)
    without_operators_of_its_own()
    nccl = device == "cuda" and task.config.launch.backend == "auto"
    dist.init_process_group(
        # objects and barriers of checkpoints go between hosts, tensors between GPUs; plain gloo takes both, tensors of
        # GPUs by way of host memory
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=store,
        rank=rank,
        world_size=task.layout.world,
        timeout=timeout,
        # NCCL connects now, not in the first collective, and a barrier need not guess the device
        device_id=torch.device("cuda", torch.cuda.current_device()) if nccl else None,
    )
    deepspeed.init_distributed(dist_backend="nccl" if nccl else "gloo", auto_mpi_discovery=False)
    with upstream.group_timeout(timeout):
        yield
    dist.destroy_process_group()


def _gpu(backend: str) -> int:
    """The number of this rank's GPU. Where ranks may share them, they go round.

    DeepSpeed takes LOCAL_RANK for that number (0.19.8, engine.py `_configure_distributed_model` and `__init__`).
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if backend == "gloo":
        number %= torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(number)
    return number


def _leave(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` so that a reader sees all of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(strict_json.dumps(result))
    temporary.replace(path)

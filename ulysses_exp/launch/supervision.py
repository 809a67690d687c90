"""The process that started ranks, while they work: it waits, watches, passes on requests to stop, and ends them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from ulysses_exp.config import device_of
from ulysses_exp.launch import heartbeat, stopping
from ulysses_exp.launch.environment import COLLECTIVES
from ulysses_exp.launch.failure import Cause, RankFailure, first_failure, is_timeout
from ulysses_exp.launch.server import Fork, ServerEnded, wait
from ulysses_exp.launch.standstill import Watch, waited_in
from ulysses_exp.launch.task import Task

_LOOK_SECONDS = 0.5  # between two looks at the heartbeats
_RECORDER_SECONDS = 20  # its monitor looks every second, and takes up to 15 s to write
_GRACE_SECONDS = 0.3  # for ranks to end by themselves after the first has

#: What ranks leave to say
_OF_ONE_ATTEMPT = (
    "error-rank*.json", "heartbeat-rank*", "stopped.json", "meeting", f"{COLLECTIVES}*", "memory-rank*.pickle",
)  # fmt: skip

#: Phases with something to save that no checkpoint has yet.
_WORTH_SAVING = ("training", "saving")


def prepare(task: Task) -> None:
    """The folder of the task, without what ranks of an earlier attempt have left there to say."""
    task.results.mkdir(parents=True, exist_ok=True)
    for pattern in _OF_ONE_ATTEMPT:
        for path in task.results.glob(pattern):
            path.unlink(missing_ok=True)


def supervise(task: Task, forks: Mapping[int, Fork]) -> None:
    """Returns when all of `forks`, ranks of `task`, have ended well; none is left however it ends.

    Raises:
        RankFailure: one failed or stands still.
        KeyboardInterrupt: the job is to stop; a checkpoint has been saved if there was time for it.
    """
    try:
        with stopping.requests.deferred():
            _until_the_end(task, forks)
    except RankFailure as failure:
        raise _with_collectives(task, failure) from None
    finally:
        end(forks)
        for fork in forks.values():
            fork.close()
    if (asked := stopping.requests.signal) is not None:
        raise KeyboardInterrupt(asked)


def end(forks: Mapping[int, Fork]) -> None:
    """Ends what still runs, stopped ranks too."""
    for fork in forks.values():
        fork.kill()
    for fork in forks.values():
        try:
            fork.join()
        except ServerEnded:
            return


def _until_the_end(task: Task, forks: Mapping[int, Fork]) -> None:
    watch = Watch(task.results, task.config.launch.timeout_s)
    looked, give_up = time.monotonic(), None
    everyone = list(forks.values())
    try:
        while None in (codes := [fork.poll() for fork in everyone]):
            if any(codes):  # one that is not None and not 0
                raise _failure(task, forks, watch)
            wait(everyone, _LOOK_SECONDS / 5)
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS:
                looked = now
                if standing := watch.standing(forks):
                    _let_nccl_write(task, forks)
                    raise watch.failure(_alive(forks), standing)
            if stopping.requests.signal is not None:
                if give_up is None:
                    give_up = now + task.config.checkpoint.on_signal_s
                    if task.config.checkpoint.on_signal_s:
                        for fork in everyone:
                            fork.send(stopping.TO_RANKS)
                if now >= give_up or not _saves(task.results, forks):
                    raise KeyboardInterrupt(stopping.requests.signal)
        if any(codes):
            raise _failure(task, forks, watch)
    except ServerEnded as ended:
        raise RankFailure(None, str(ended)) from None


def _let_nccl_write(task: Task, forks: Mapping[int, Fork]) -> None:
    """On GPUs, waits for NCCL to see the same as this process and to write down each rank's last collectives."""
    end = time.monotonic() + _RECORDER_SECONDS
    while (
        device_of(task.config) == "cuda"
        and len(list(task.results.glob(f"{COLLECTIVES}*"))) < len(forks)
        and time.monotonic() < end
    ):
        time.sleep(0.2)


def _with_collectives(task: Task, failure: RankFailure) -> RankFailure:
    """`failure`, and where ranks have waited for others also the files that say in which collectives."""
    if failure.cause == Cause.ERROR or not any(task.results.glob(f"{COLLECTIVES}*")):
        return failure
    where = task.results.relative_to(task.folder)
    message = f"{failure.message}; the ranks' last collectives: torchfrtrace -p {COLLECTIVES} {where}"
    return RankFailure(failure.rank, message, failure.trace, failure.cause, failure.time)


def _saves(folder: Path, forks: Mapping[int, Fork]) -> bool:
    """Whether ranks are at work that a checkpoint would keep, or have just ended it."""
    beats = [heartbeat.last(folder, rank) for rank in forks]
    return any(beat is not None and beat.phase in _WORTH_SAVING for beat in beats)


def _alive(forks: Mapping[int, Fork]) -> dict[int, Fork]:
    return {rank: fork for rank, fork in forks.items() if fork.poll() is None}


def _failure(task: Task, forks: Mapping[int, Fork], watch: Watch) -> RankFailure:
    """Why ranks have ended with another exit code than 0."""
    end_of_grace = time.monotonic() + _GRACE_SECONDS
    while (alive := _alive(forks)) and time.monotonic() < end_of_grace:
        wait(list(alive.values()), 0.05)
    found = first_failure(task.results, {rank: fork.exitcode for rank, fork in forks.items()})
    if alive and is_timeout(found.trace):  # a rank waited too long: for one of those that are still there
        told = watch.failure(alive, {})
        message = f"{told.message}; rank {found.rank} {waited_in(found.trace)}"
        return RankFailure(told.rank, message, f"{told.trace}\nrank {found.rank}:\n{found.trace}", told.cause)
    return found


def stopped_at(task: Task) -> dict[str, object] | None:
    """`{"checkpoint", "step"}` of the checkpoint that was saved since the job had to stop; None where there is none."""
    try:
        stopped: dict[str, object] = json.loads((task.results / "stopped.json").read_text())
    except OSError:
        return None
    return stopped

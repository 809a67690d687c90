"""Ranks that torchrun, srun or the deepspeed launcher has started: this command runs once in each of them.

Rank 0 is also the parent: it alone composes the configuration and owns the output folder. The others wait on a store
for tasks. A task that needs fewer ranks runs on the first ones. Each task is done by a fresh fork of each rank, as with
`launch=local`: what torch and DeepSpeed keep in a process after a task ends with it, and a fork that dies or stands
still is told of by the process that has started it.

The store listens on the launcher's network, and anybody there can write to it. So a task comes as data, never as a
pickle, and what would let code in has to be in the command of the rank itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ulysses_exp.config import Config, ConfigError, LaunchConfig, doors
from ulysses_exp.launch import stopping
from ulysses_exp.launch.environment import prepare as prepare_environment
from ulysses_exp.launch.failure import Cause, RankFailure
from ulysses_exp.launch.orphans import die_with_parent
from ulysses_exp.launch.rank import be_rank
from ulysses_exp.launch.seat import Seat, seat
from ulysses_exp.launch.server import ServerEnded, server
from ulysses_exp.launch.standstill import waited_in
from ulysses_exp.launch.supervision import prepare, supervise
from ulysses_exp.launch.task import Task

if TYPE_CHECKING:
    from torch.distributed import Store

_END = "end"
_ALIVE_SECONDS = 2  # between two signs of life of rank 0
_GOODBYE_SECONDS = 5
_GRACE_SECONDS = 10  # beyond launch.timeout_s, for other ranks to say what became of them


class AttachedRanks:
    """Rank 0's view: hands out tasks and takes part in them."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.seat, self.timeout_s = seat(), launch.timeout_s
        self.store = _sit_down(self.seat, self.timeout_s)
        self.number = 0
        self._complete = False
        self._done = threading.Event()
        threading.Thread(target=self._give_signs_of_life, name="signs of life", daemon=True).start()

    def run(self, task: Task) -> None:
        """Runs `task` on the first ranks. Raises RankFailure, KeyboardInterrupt."""
        world = task.layout.world
        if world > self.seat.world:
            raise RankFailure(None, f"{task.layout} needs {world} ranks, {self.seat.world} are attached")
        self._wait_for_all()
        prepare(task)
        self.number += 1
        self.store.set(f"task{self.number}", task.to_json())
        outcomes = {0: _take_part(self.store, self.number, task, self.seat)}
        for rank in range(1, world):
            outcomes[rank] = self._outcome(rank)
        if stopping.requests.signal is not None:
            raise KeyboardInterrupt(stopping.requests.signal)
        failed = [RankFailure(**outcome) for outcome in outcomes.values() if outcome is not None]
        if failed:
            first = min(failed, key=lambda failure: (failure.cause, failure.time))
            traces = [f"rank {f.rank}: {f.message}\n{f.trace}" for f in failed]
            waited = [f for f in failed if f.cause == Cause.OTHERS and f is not first][:3]
            message = "; ".join([first.message, *(f"rank {f.rank} {waited_in(f.trace)}" for f in waited)])
            raise RankFailure(first.rank, message, "\n".join(traces), first.cause)

    def close(self) -> None:
        """Lets the other ranks go; where this process has the store, they say goodbye first."""
        self._done.set()
        with suppress(RuntimeError):
            self.store.set(f"task{self.number + 1}", _END)
            if self._complete and not self.seat.hosted:
                others = [f"bye/{rank}" for rank in range(1, self.seat.world)]
                _there(self.store, others, _GOODBYE_SECONDS)

    def _wait_for_all(self) -> None:
        others = [f"here/{rank}" for rank in range(1, self.seat.world)]
        if self._complete or not others:
            return
        if not _there(self.store, others, self.timeout_s):
            missing = [key.removeprefix("here/") for key in others if not self.store.check([key])]
            problem = f"{len(missing)} of {self.seat.world} ranks have not come within launch.timeout_s"
            named = f"rank {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"
            raise RankFailure(None, f"{problem}={self.timeout_s}: {named}")
        self._complete = True

    def _outcome(self, rank: int) -> dict[str, Any] | None:
        key, seconds = f"done{self.number}/{rank}", self.timeout_s + _GRACE_SECONDS
        if _there(self.store, [key], seconds):
            outcome: dict[str, Any] | None = json.loads(self.store.get(key))
            return outcome
        return _as_json(RankFailure(rank, f"does not answer since {seconds} s", cause=Cause.STANDS_STILL))

    def _give_signs_of_life(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it who would listen
            store = _store(self.seat, self.timeout_s, hosts=False)
            number = 0
            while not self._done.wait(min(_ALIVE_SECONDS, self.timeout_s / 4)):
                number += 1
                store.set("alive", str(number))


def serve(overrides: list[str], own: Callable[[], Config]) -> int:
    """What every rank but 0 does: tasks, until there are no more. Returns the exit code.

    Args:
        overrides: of the command line; the rest of the configuration comes with the tasks.
        own: the configuration that this process was started with; asked for where a task needs its user's trust.
    """
    place = seat()
    timeout_s = _timeout(overrides)
    number = 1
    try:
        with stopping.requests.heeded():
            store = _sit_down(place, timeout_s)
            store.set(f"here/{place.rank}", "")
            while (message := _next(store, number, timeout_s)) != _END.encode():
                try:
                    task = Task.from_json(message)
                    _check_doors(task, own)
                except ValueError as error:
                    print(f"rank {place.rank}: no task of this job: {error}", file=sys.stderr)
                    return 1
                if place.rank < task.layout.world:
                    task.results.mkdir(parents=True, exist_ok=True)
                    outcome = _take_part(store, number, task, place)
                    store.set(f"done{number}/{place.rank}", json.dumps(outcome))
                    if outcome is not None:
                        print(f"rank {place.rank}: {outcome['message']}", file=sys.stderr)
                if stopping.requests.signal is not None:
                    return 130
                number += 1
            store.set(f"bye/{place.rank}", "")
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, ConfigError) as error:
        print(f"rank {place.rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
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


def _timeout(overrides: list[str]) -> int:
    given = [o.partition("=")[2] for o in overrides if o.startswith("launch.timeout_s=")]
    return int(given[-1]) if given and given[-1].isdecimal() else LaunchConfig.timeout_s


def _sit_down(place: Seat, timeout_s: int) -> Store:
    """The store, once this process has what tasks need."""
    die_with_parent()
    prepare_environment("auto")
    server()  # imports while this process connects
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of this process: a lost store is reported once, by us
    return _store(place, timeout_s, hosts=place.rank == 0 and not place.hosted)


def _store(place: Seat, timeout_s: int, *, hosts: bool) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(place.host, place.port, None, is_master=hosts, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        where = f"{place.host}:{place.port}"
        what = f"cannot listen on {where}" if hosts else f"cannot reach rank 0 at {where} within {timeout_s} s"
        raise ConfigError("launch", what, "set MASTER_ADDR and MASTER_PORT to where rank 0 can listen") from error
    return PrefixStore(f"ulysses-exp/{place.attempt}", store)


def _there(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all `keys` come within so many seconds. Asks again and again: the store's own wait heeds no signal."""
    end, pause = time.monotonic() + seconds, 0.005
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _next(store: Store, number: int, timeout_s: int) -> bytes:
    """The next task. Raises RuntimeError where rank 0 is gone or gives no sign of life for `timeout_s`."""
    alive, changed = b"", time.monotonic()
    while True:
        try:
            if _there(store, [f"task{number}"], _ALIVE_SECONDS):
                task: bytes = store.get(f"task{number}")
                return task
            newest = store.get("alive") if store.check(["alive"]) else b""
        except RuntimeError:
            raise RuntimeError("rank 0 or its launcher is gone") from None
        if newest != alive:
            alive, changed = newest, time.monotonic()
        elif time.monotonic() - changed > timeout_s:
            raise RuntimeError(f"rank 0 gives no sign of life since launch.timeout_s={timeout_s} s")


def _take_part(store: Store, number: int, task: Task, place: Seat) -> dict[str, Any] | None:
    """Does this rank's part of `task` in a fork. Returns None, or its failure."""
    try:
        supervise(task, {place.rank: server(task.config.launch.start).fork(_rank, task, place, number)})
    except RankFailure as failure:
        return _as_json(failure)
    except ServerEnded as ended:
        return _as_json(RankFailure(place.rank, str(ended)))
    except KeyboardInterrupt:
        if stopping.requests.signal is None:  # Ctrl-C
            raise
        return _as_json(RankFailure(place.rank, f"stopped by {stopping.requests.signal}"))
    return None


def _as_json(failure: RankFailure) -> dict[str, Any]:
    return {
        "rank": failure.rank, "message": failure.message, "trace": failure.trace, "time": failure.time,
        "cause": failure.cause,
    }  # fmt: skip


def _rank(task: Task, place: Seat, number: int) -> None:
    """In the fork."""
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(task.layout.world))

    def meet() -> Store:
        from torch.distributed import PrefixStore

        return PrefixStore(f"group{number}", _store(place, task.config.launch.timeout_s, hosts=False))

    be_rank(task, place.rank, meet)

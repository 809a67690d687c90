"""Traces, each in a process of its own: a fork of the warm server that also starts ranks.

A trace gives torch a device and DeepSpeed an accelerator and process groups, none of which can be taken back.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ulysses_exp.config import Config, ConfigError, device_of
from ulysses_exp.launch.local import warm_up
from ulysses_exp.launch.server import Fork, ServerEnded, server

A = TypeVar("A")
R = TypeVar("R")

log = logging.getLogger("ulysses_exp")


class TraceError(RuntimeError):
    """The model, layout or memory options do not run; `str()` is the reason that a real run would give."""


class Forks:
    """Calls functions in fresh processes, a few at a time. Use `forks`."""

    def __init__(self, at_a_time: int):
        self._threads = ThreadPoolExecutor(at_a_time)
        self._running: set[Fork] = set()
        self._lock = threading.Lock()  # between a process that starts and `close`
        self._closed = False

    def map(self, function: Callable[[A], R], arguments: Sequence[A]) -> list[R]:
        """`function` of each of `arguments`, in order. Raises TraceError, ConfigError."""
        return [future.result() for future in [self.start(function, argument) for argument in arguments]]

    def start(self, function: Callable[[A], R], argument: A) -> Future[R]:
        """`function(argument)`, later; the future's `result` raises TraceError, ConfigError."""
        return self._threads.submit(self._call, function, argument)

    def _call(self, function: Callable[[A], R], argument: A) -> R:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with receiver:
            with sender, self._lock:
                if self._closed:
                    raise TraceError("no longer asked for")
                process = server().fork(_answer, function, argument, fds=[sender.fileno()])
                self._running.add(process)
            try:
                result, error, trace = receiver.recv()
            except EOFError:
                raise TraceError(_how_it_ended(process)) from None
            finally:
                with self._lock:
                    self._running.discard(process)
                    process.close()
        if error is not None:
            log.error("plan: %s", trace)
            raise error
        return result

    def close(self) -> None:
        """Ends what is still running."""
        with self._lock:
            self._closed = True
            for process in list(self._running):
                process.kill()
        self._threads.shutdown(cancel_futures=True)


def _how_it_ended(process: Fork) -> str:
    """Of one that left no answer."""
    try:
        code = process.join()
    except ServerEnded as error:
        return f"{error}; run the plan again"
    if code == -signal.SIGKILL:
        return (
            "the process that traces the model was ended by SIGKILL, as the kernel does where memory runs out: a trace "
            "takes about 1 GB; free some, or plan fewer ranks or layers"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no answer"
    return f"the process that traces the model {how}; run the plan again"


@contextlib.contextmanager
def forks(config: Config) -> Iterator[Forks]:
    """As many processes at a time as there are cores, two at most: more traces than that are never asked for.

    They end with this process, whatever ends it.
    """
    warm_up(device_of(config))
    pool = Forks(min(2, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.close()


def _answer(function: Callable[[Any], Any], argument: Any, pipe: int) -> None:
    """In the fork: sends (result, exception, trace). What the libraries print goes nowhere."""
    sender = Connection(pipe, readable=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        sender.send((function(argument), None, None))
    except Exception as error:
        told = error if isinstance(error, ConfigError) else TraceError(f"{type(error).__name__}: {_first_line(error)}")
        sender.send((None, told, traceback.format_exc()))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")

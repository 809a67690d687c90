"""Traces in processes of their own, as many at a time as there are cores to spare."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ulysses_exp.plan.trace import Request, Trace


class Tracers:
    """Processes that trace; each takes one request after the other."""

    def __init__(self, processes: list[Any]):
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for process in processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(len(processes))

    def trace(self, requests: list[Request]) -> list[Trace]:
        """A trace for each request, in order. Raises RuntimeError with the last line of what went wrong."""
        return list(self._threads.map(self._one, requests))

    def _one(self, request: Request) -> Trace:
        process, errors = self._free.get()
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            process.wait()
            errors.seek(0)
            lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
            told = [line for line in lines if "Error: " in line] or lines[-1:] or ["no message"]
            raise RuntimeError(f"the trace of the model ended: {told[-1]}") from None
        finally:
            self._free.put((process, errors))


@contextlib.contextmanager
def tracers(processes: int = 2) -> Iterator[Tracers]:
    """Starts `processes` tracers, fewer where there are fewer cores, and ends them."""
    root = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_SIZE", "RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(max(1, min(processes, os.cpu_count() or 1))):
            errors = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [sys.executable, "-c", "from ulysses_exp.plan.trace import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
            stack.callback(_end, process)
            started.append((process, errors))
        yield Tracers(started)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

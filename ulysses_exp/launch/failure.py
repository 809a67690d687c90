"""Which rank failed first, and why."""

from __future__ import annotations

import json
import signal
import time
import traceback
from pathlib import Path

from ulysses_exp.config import ConfigError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


def _says_out_of_memory(text: str) -> bool:
    return any(mark in text.lower() for mark in _OUT_OF_MEMORY)


class RankFailure(Exception):
    """`str()` is for the user: the rank, what it said. `trace` is for the log.

    Args:
        everywhere: what it said is no matter of this rank alone, as that of a wrong configuration.
    """

    def __init__(self, rank: int, message: str, trace: str = "", everywhere: bool = False):
        super().__init__(message if everywhere else f"rank {rank}: {message}")
        self.rank, self.message, self.trace = rank, message, trace

    @property
    def out_of_memory(self) -> bool:
        """Whether memory ran out, as far as the rank, or the kernel that killed it, could say."""
        return _says_out_of_memory(self.message)


def record(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves `error` of `rank` where the parent finds it. The time tells the first failure from those it caused."""
    text = str(error)
    oom = isinstance(error, MemoryError) or _says_out_of_memory(text)
    everywhere = isinstance(error, ConfigError)
    message = text if everywhere else f"{type(error).__name__}: {text}" if text else type(error).__name__
    entry = {
        "time": time.time(),
        "message": f"out of memory ({message})" if oom else message,
        "everywhere": everywhere,
        "trace": "".join(traceback.format_exception(error)),
    }
    (folder / f"error-rank{rank}.json").write_text(json.dumps(entry))


def first_failure(folder: Path, exitcodes: dict[int, int | None]) -> RankFailure:
    """The failure that the others followed from: a killed rank, else the earliest error that `folder` holds."""
    for rank, code in exitcodes.items():
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = (
                " (SIGKILL: the kernel's answer to out of memory, unless somebody sent it)" if name == "SIGKILL" else ""
            )
            said = folder / f"rank{rank}.err"
            if name == "SIGABRT" and said.exists() and "std::bad_alloc" in said.read_text(errors="replace"):
                hint = " (out of memory: std::bad_alloc in a thread of its own)"
            return RankFailure(rank, f"killed by {name}{hint}")
    errors = []
    for path in folder.glob("error-rank*.json"):
        entry = json.loads(path.read_text())
        errors.append((entry["time"], int(path.stem.removeprefix("error-rank")), entry))
    if errors:
        _, rank, entry = min(errors, key=lambda e: e[:2])
        lines = entry["message"].splitlines()
        first = next((line for line in lines if line.strip()), "no message")
        return RankFailure(rank, first, entry["trace"], entry.get("everywhere", False))
    rank, code = next(((r, c) for r, c in exitcodes.items() if c), (0, None))
    return RankFailure(rank, f"ended with exit code {code} and no message")

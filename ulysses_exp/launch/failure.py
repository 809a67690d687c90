"""Which rank failed first, and why."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import traceback
from enum import IntEnum
from pathlib import Path
from time import time as now

from ulysses_exp.config import ConfigError
from ulysses_exp.config.redaction import redacted
from ulysses_exp.launch.output_trouble import full_places

#: What collectives and stores of torch say when they have waited for `launch.timeout_s`.
_TIMEOUT = ("timed out", "timeout")

#: What ProcessGroupNCCL of torch 2.13 says before it ends the process
_WATCHDOG = re.compile(r"Watchdog caught collective operation timeout: WorkNCCL\(.*?OpType=(?P<what>\w+).*")

_LAST_WORDS = "ulysses-exp: "  # what follows, in a rank's stderr, is its error

#: Of Python, the system, CUDA, cuBLAS, cuDNN and NCCL
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc", "cudaerrormemoryallocation",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "failed to cuda calloc", "failed to cuda malloc",
)  # fmt: skip


def _says_out_of_memory(text: str) -> bool:
    return any(mark in text.lower() for mark in _OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a rank says that memory ran out, of the machine or of a device."""
    return isinstance(error, MemoryError) or _says_out_of_memory(str(error))


def is_timeout(text: str) -> bool:
    """Whether an error says that a rank waited too long for others."""
    return any(mark in text.lower() for mark in _TIMEOUT)


def _lost_another(text: str) -> bool:
    return "connection closed by peer" in text.lower() or "connection reset" in text.lower()


class Cause(IntEnum):
    """What of several failures the others followed from: the least."""

    KILLED = 0
    STANDS_STILL = 1
    ERROR = 2
    OTHERS = 3  # waited for a rank that did not come, or lost one


class RankFailure(Exception):
    """`str()` is for the user: the rank, what it said. `trace` is for the log, `time` is Unix time."""

    def __init__(
        self,
        rank: int | None,
        message: str,
        trace: str = "",
        cause: int = Cause.ERROR,
        time: float | None = None,
    ):
        super().__init__(message if rank is None else f"rank {rank}: {message}")
        self.rank, self.message, self.trace, self.cause = rank, message, trace, Cause(cause)
        self.time = now() if time is None else time

    @property
    def out_of_memory(self) -> bool:
        """Whether memory ran out, as far as the rank, or the kernel that killed it, could say."""
        return _says_out_of_memory(self.message)


def record(folder: Path, rank: int, error: BaseException, snapshot: str | None = None) -> None:
    """Leaves `error` of `rank` where the parent finds it, unless the rank has left one already.

    The time tells the first failure from those it caused.

    Args:
        snapshot: of a rank out of memory, the file that says what its allocator did.
    """
    if (folder / f"error-rank{rank}.json").exists():
        return
    text = str(error)
    oom = is_out_of_memory(error)
    noted = f", its allocations are in {snapshot}" if snapshot else ""
    everywhere = isinstance(error, ConfigError)
    message = text if everywhere else f"{type(error).__name__}: {text}" if text else type(error).__name__
    entry = {
        "time": now(),
        "message": f"out of memory{noted} ({message})" if oom else message,
        "everywhere": everywhere,  # no matter of this rank alone
        "trace": "".join(traceback.format_exception(error)),
    }
    try:
        temporary = folder / f"error-rank{rank}.tmp"  # the parent may end this process at any time
        temporary.write_text(redacted(json.dumps(entry)))
        temporary.replace(folder / f"error-rank{rank}.json")
    except OSError:  # no room for a file; the one that stderr goes to is there already
        with contextlib.suppress(OSError):
            print(redacted(f"{_LAST_WORDS}{' '.join(message.split())}"), file=sys.stderr, flush=True)


def waited_for_nccl(said: str) -> str | None:
    """Where a rank was that NCCL's watchdog has ended, from what that said; such a rank leaves no error record."""
    match = _WATCHDOG.search(said)
    return f"waited in NCCL's {match['what'].lower()} for launch.timeout_s" if match else None


def first_failure(folder: Path, exitcodes: dict[int, int | None]) -> RankFailure:
    """The failure that the others followed from: a killed rank, else the earliest error that `folder` holds."""
    gave_up = None
    for rank, code in exitcodes.items():
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = (
                " (SIGKILL: the kernel's answer to out of memory, unless somebody sent it)" if name == "SIGKILL" else ""
            )
            path = folder / f"rank{rank}.err"
            said = path.read_text(errors="replace") if name == "SIGABRT" and path.exists() else ""
            if waited := waited_for_nccl(said):
                gave_up = gave_up or RankFailure(rank, waited, said, Cause.OTHERS)
                continue
            if "std::bad_alloc" in said:
                hint = " (out of memory: std::bad_alloc in a thread of its own)"
            return RankFailure(rank, f"killed by {name}{hint}", cause=Cause.KILLED)
    errors, unsaid = [], []
    for path in folder.glob("error-rank*.json"):
        try:
            entry = json.loads(path.read_text())
        except ValueError:  # not even the reason could be written
            unsaid.append(folder)
            continue
        errors.append((entry["time"], int(path.stem.removeprefix("error-rank")), entry))
    full = unsaid or full_places([folder, Path("/dev/shm")])
    if full and not any("cannot be written" in entry["message"] for _, _, entry in errors):
        rank = next((r for r, code in exitcodes.items() if code), 0)  # who failed first could not say why
        return RankFailure(rank, f"the disk of {full[0]} is full")
    if errors:
        _, rank, entry = min(errors, key=lambda e: e[:2])
        lines = entry["message"].splitlines()
        cause = Cause.OTHERS if is_timeout(entry["trace"]) or _lost_another(entry["trace"]) else Cause.ERROR
        first = next((line for line in lines if line.strip()), "no message")
        whose = None if entry.get("everywhere") else rank
        return RankFailure(whose, first, entry["trace"], cause, entry["time"])
    if gave_up is not None:
        return gave_up
    for rank in exitcodes:
        path = folder / f"rank{rank}.err"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if words := [line for line in lines if line.startswith(_LAST_WORDS)]:
            return RankFailure(rank, words[0].removeprefix(_LAST_WORDS))
    rank, code = next(((r, c) for r, c in exitcodes.items() if c), (0, None))
    return RankFailure(rank, f"ended with exit code {code} and no message")

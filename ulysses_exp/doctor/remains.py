"""What dead runs have left on this machine, and how it is known to be this project's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ulysses_exp.doctor.finding import Asked, Finding, ok, warning

#: How the server of a command's ranks (launch/server.py) is started; its forks, the ranks, keep its command line. The
#: number is the command's.
_RANKS_OF = re.compile(rb"from ulysses_exp\.launch\.server import serve; serve\(\d+, (\d+)\b")
_SHOWN = 3  # of each kind, the others as a number
_CLEAN = "python -m ulysses_exp.doctor --clean"


@dataclass(frozen=True)
class Process:
    """A process of this user's; `started` in clock ticks since boot tells it from a later one with its number."""

    pid: int
    started: int
    owner: int | None  # the command of this project that it was started for, where it was

    def __str__(self) -> str:
        return f"process {self.pid} of command {self.owner}"


@dataclass(frozen=True)
class Remains:
    """`processes` and `partial` are this project's own. It leaves nothing in /dev/shm today; older versions and other
    programs do, and of such a file nobody can tell whose it is."""

    processes: list[Process]
    partial: list[Path]  # checkpoints whose writing was cut off
    shared_memory: list[Path]  # files of this user in /dev/shm that no living process holds
    interrupted: list[Path]  # run folders that say `running`, in which nobody works; nothing to remove there

    def own(self) -> list[Process | Path]:
        return [*self.processes, *self.partial]


def check(asked: Asked) -> Iterator[Finding]:
    """A line for each kind of remains."""
    yield from findings(find(asked.outputs))


def findings(remains: Remains) -> Iterator[Finding]:
    """A line for each kind of remains; one that all is clean where there are none."""
    kinds: list[tuple[str, list[Process] | list[Path], str, str]] = [
        ("processes", remains.processes, "whose command has ended", _CLEAN),
        ("checkpoints", remains.partial, "cut off while it was written; those before it are whole", _CLEAN),
        ("runs", remains.interrupted, "interrupted", "the same command again goes on where it stopped"),
        ("/dev/shm", remains.shared_memory, "held by no process, and whose they are cannot be told",
         "rm them, unless a program in another container shares this /dev/shm"),
    ]  # fmt: skip
    found = False
    for name, things, what, mend in kinds:
        if things:
            found = True
            more = f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
            yield warning(name, f"{', '.join(map(str, things[:_SHOWN]))}{more}: {what}", mend)
    if not found:
        yield ok("remains", "no process, no file in /dev/shm, no half-written checkpoint")


def find(outputs: Path) -> Remains:
    """Looks at this user's processes, at /dev/shm, and at the run folders below `outputs`."""
    alive = _processes()
    held = _held_files(alive)
    partial, interrupted = _runs(outputs, held)
    orphans = [process for process in alive.values() if _orphaned(process)]
    return Remains(sorted(orphans, key=lambda p: p.pid), partial, _shared_memory(held), interrupted)


def clean(remains: Remains) -> list[str]:
    """Removes what is this project's own; returns what could not be removed, with the reason."""
    troubles = []
    for process in remains.processes:
        try:
            again = _process(Path(f"/proc/{process.pid}"))
            if again == process:  # not another one that has got its number since
                os.kill(process.pid, signal.SIGKILL)
        except OSError as error:
            troubles.append(f"{process}: {error.strerror}")
    for folder in remains.partial:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            troubles.append(f"{folder}: {error.strerror}")
    return troubles


def _processes() -> dict[int, Process]:
    """The living processes of this user, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == os.getuid() and (process := _process(folder)):
                found[process.pid] = process
        except OSError:  # it has ended
            continue
    return found


def _process(folder: Path) -> Process | None:
    """The process of a folder of proc(5); None where it has ended and waits to be asked how. Raises OSError."""
    state = folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()
    if state[0] in "ZX":
        return None
    owner = _RANKS_OF.search(folder.joinpath("cmdline").read_bytes())
    return Process(int(folder.name), int(state[19]), int(owner[1]) if owner else None)


def _orphaned(process: Process) -> bool:
    """Whether the command that `process` was started for is gone, also where another has got its number."""
    if process.owner is None:
        return False
    try:
        owner = _process(Path(f"/proc/{process.owner}"))
    except OSError:
        return True
    return owner is None or owner.started > process.started


def _held_files(alive: dict[int, Process]) -> set[str]:
    """Paths that living processes have open, and the inodes (as text) of what they have mapped from /dev/shm.

    A semaphore is mapped under a name that sem_open drops at once, so it is known by its inode.
    """
    held: set[str] = set()
    for pid in alive:
        folder = Path(f"/proc/{pid}")
        try:
            held.update(re.findall(r" (\d+) +/dev/shm/", folder.joinpath("maps").read_text()))
            for descriptor in os.scandir(folder / "fd"):
                try:
                    held.add(os.readlink(descriptor.path))
                except OSError:
                    continue
        except OSError:
            continue
    return held


def _shared_memory(held: set[str]) -> list[Path]:
    """This user's files in /dev/shm that nobody holds."""
    found = []
    try:
        entries = list(os.scandir("/dev/shm"))
    except OSError:
        return []
    for entry in entries:
        try:
            is_file, about = entry.is_file(follow_symlinks=False), entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if is_file and about.st_uid == os.getuid() and str(about.st_ino) not in held and entry.path not in held:
            found.append(Path(entry.path))
    return sorted(found)


def _runs(outputs: Path, held: set[str]) -> tuple[list[Path], list[Path]]:
    """(checkpoints cut off, run folders that still say `running`) below `outputs`, where no process works."""
    partial: list[Path] = []
    interrupted = []
    for path, folders, files in os.walk(outputs):
        if ".hydra" not in folders:
            continue
        folders[:] = []
        run = Path(path)
        cut_off = [p for p in run.glob("checkpoints/.step*.partial") if p.is_dir() and not p.is_symlink()]
        running = "results.json" in files and _status(run / "results.json") == "running"
        if (cut_off or running) and not _in_use(run, held):
            partial += cut_off
            interrupted += [run] if running else []
    return sorted(partial), sorted(interrupted)


def _in_use(run: Path, held: set[str]) -> bool:
    """Whether a process has something in `run` open: a job has its run.log open from its beginning to its end."""
    below = str(run.resolve()) + os.sep
    return any(path.startswith(below) for path in held)


def _status(results: Path) -> str | None:
    try:
        status = json.loads(results.read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status if isinstance(status, str) else None

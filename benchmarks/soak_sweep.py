"""The sweep of the soak as seen from outside: its processes, its jobs, what they leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: In the environment of everything that a command starts, and so of every process that it leaves
MARK = "ULYSSES_EXP_SOAK"


class Command:
    """A call of run.py, and the processes that belong to it."""

    def __init__(self, folder: Path, overrides: list[str], log: Path):
        self._mark, self.log, self.code = uuid.uuid4().hex, log, None
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self._mark}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *overrides],
                cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        self.code: int | None = self._process.poll()
        return self.code is not None

    def wait(self, seconds: float) -> int:
        self.code = self._process.wait(seconds)
        return self.code

    def family(self) -> dict[str, list[int]]:
        """Process ids: of the `command`, of the `server` that forks its ranks, of the `ranks`, of `others`."""
        parents = _parents()
        own = {self._process.pid}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        server = [pid for pid in own if parents.get(pid) == self._process.pid and _forks_ranks(pid)]
        ranks = sorted(pid for pid in own if parents.get(pid) in server)
        others = sorted(own - {self._process.pid, *server, *ranks})
        return {"ranks": ranks, "server": server, "others": others, "command": [self._process.pid]}

    def left(self) -> list[str]:
        """What the command has left running, two seconds after its end at most."""
        end = time.monotonic() + 2
        while (found := self._marked()) and time.monotonic() < end:
            time.sleep(0.1)
        return [f"process {pid}: {line}" for pid, line in found]

    def end(self) -> None:
        """Ends the command and whatever it has started."""
        for pid, _ in self._marked():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(30)

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "nothing"

    def _marked(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # another user's, or gone
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes() and alive(int(folder.name)):
                    found.append((int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        return found


def alive(pid: int) -> bool:
    """Not gone, and not waiting to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _parents() -> dict[int, int]:
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
    return found


def _forks_ranks(pid: int) -> bool:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"ulysses_exp.launch.server" in line or b"ulysses_exp.rank.preload" in line
    return False


def left_in_shared_memory() -> set[str]:
    """Files of /dev/shm that no living process has mapped, known by their inodes: sem_open maps under another name."""
    made = {}
    for file in os.scandir("/dev/shm"):
        with suppress(OSError):
            made[file.name] = file.stat().st_ino
    mapped: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped.update(map(int, re.findall(r" (\d+) +/dev/shm/", maps.read_text())))
    return {name for name, inode in made.items() if inode not in mapped}


class Jobs:
    """The run folders of a sweep as they come and change. `lost`: jobs whose newest checkpoint went back."""

    def __init__(self, folder: Path, count: int, steps: int):
        self.folder, self.count, self.steps = folder, count, steps
        self.lost: list[str] = []
        self._ok: set[str] = set()
        self._newest: dict[str, int] = {}

    def names(self) -> list[str]:
        with suppress(OSError):
            return [e.name for e in os.scandir(self.folder) if e.is_dir() and not e.name.startswith(".")]
        return []

    def results(self, job: str) -> dict[str, Any]:
        """results.json of `job`; empty where there is none."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / job / "results.json").read_text()) if job else {}
        return {}

    def done(self) -> int:
        """How many jobs are ok."""
        self._ok |= {job for job in self.names() if job not in self._ok and self.results(job).get("status") == "ok"}
        return len(self._ok)

    def current(self) -> str:
        """The job that was worked on last and was not ok when `done` last looked; '' where there is none."""

        def touched(job: str) -> float:
            times = [0.0]
            for path in (self.folder / job, self.folder / job / "run.log", self.folder / job / "ranks"):
                with suppress(OSError):
                    times.append(path.stat().st_mtime)
            return max(times)

        return max((job for job in self.names() if job not in self._ok), key=touched, default="")

    def moment(self, command: Command) -> str:
        """What the sweep is at: importing, between (jobs), starting, training, saving, evaluating."""
        job = self.folder / (self.current() or "none")
        with suppress(OSError):  # asked first, for it does not last; what an earlier attempt left is older
            began = (job / "run.log").stat().st_mtime
            partial = [entry for entry in os.scandir(job / "checkpoints") if entry.name.endswith(".partial")]
            if any(entry.stat().st_mtime > began for entry in partial):
                return "saving"
        family = command.family()
        if not family["server"]:
            return "importing"
        if not family["ranks"]:
            return "between"
        try:
            if (job / "metrics.jsonl").stat().st_mtime < (job / "run.log").stat().st_mtime:
                return "starting"  # what it holds is an earlier attempt's
            lines = (job / "metrics.jsonl").read_text().count("\n")
        except OSError:
            return "starting"
        return "training" if lines < self.steps else "evaluating"

    def watch(self) -> None:
        """Notes the newest checkpoint of the job that is worked on; a job that has lost its own is told once."""
        if not (job := self.current()):
            return
        try:
            newest = int((self.folder / job / "checkpoints" / "latest").read_text().strip().removeprefix("step"))
        except (OSError, ValueError):
            newest = 0
        before = self._newest.get(job, 0)
        if newest < before:
            self.lost.append(f"{job}: checkpoint step{before} is gone, step{newest} is the newest")
        self._newest[job] = newest

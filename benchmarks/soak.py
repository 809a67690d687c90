"""A sweep whose processes are killed at random, beside the same sweep left alone.

    python benchmarks/soak.py [--kills 100] [--jobs 200] [--seed 0] [--folder FOLDER]

The jobs: tiny models, 1 and 2 sequence-parallel ranks at ZeRO 2 and 3, many seeds; each trains, saves every second step
and evaluates. They run once undisturbed (`calm`). Then the same sweep (`rough`) gets the kills, drawn from a generator
whose seed is printed: of a rank, of the server that forks the ranks, of the command, of everything at once; a rank is
stopped (SIGSTOP); the command is asked to end (SIGTERM). Moments are drawn, too: any, while a job starts, while it
saves or evaluates, between jobs. The command is called again whenever it has ended, and at last
until every job is ok. Then:

- results.json, metrics.jsonl and the checkpoints of every job equal those of the undisturbed sweep, bit for bit, except
  for what tells time, memory or paths (soak_equal.py);
- `checkpoints/latest` of no job has ever gone back;
- no process and no file in /dev/shm is left.

Writes soak.md and soak.json: into benchmarks/results, with --folder into that folder, where the sweeps are kept, too.
Exit code 1 where one of the above does not hold, or a kill had no effect within two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_equal import differences
from soak_sweep import Command, Jobs, alive, left_in_shared_memory
from soak_table import markdown

ROOT = Path(__file__).resolve().parents[1]
STEPS, TIMEOUT_S = 6, 20
EFFECT_S = 120  # by when the job of what was killed has ended
CALLS = 10  # at the end, without kills

#: Kinds of kills and their weights. A stopped rank costs launch.timeout_s, what ends the command an import of torch
KINDS = {"rank": 35, "server": 10, "command": 20, "all": 15, "stopped": 10, "asked": 10}
#: Moments that a kill may wait for, and their weights
MOMENTS = {"any": 45, "starting": 10, "saving": 25, "evaluating": 15, "between": 5}


def settings(jobs: int) -> list[str]:
    """The sweep, as run.py takes it."""
    return [f"seed=range({max(1, jobs // 4)})", "sp.size=1,2", "zero.stage=2,3", "stages=[train,eval]",
            "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=64",
            "model.architecture.intermediate_size=128", "train.seq_len=32", f"train.steps={STEPS}",
            "train.global_batch_size=2", "train.unmeasured_steps=0", "checkpoint.every=2", "checkpoint.keep=9",
            "eval.sequences=2", "device=cpu", "tracker.mode=disabled", f"launch.timeout_s={TIMEOUT_S}"]  # fmt: skip


@dataclass
class Kill:
    """One of them: what was killed, when, and what came of it."""

    number: int
    kind: str
    job: str = ""
    moment: str = ""  # what the job was at
    said: str = ""  # results.json, else the command's last line
    seconds: float | None = None  # until the job, or the command, had ended with all its processes; None: it had not
    left: list[str] = field(default_factory=list)


class Soak:
    """The rough sweep and those who disturb it."""

    def __init__(self, folder: Path, jobs: int, rng: random.Random):
        self.folder, self.overrides, self.rng = folder, ["-m", "sweep.name=rough", *settings(jobs)], rng
        self.jobs = Jobs(folder / "outputs" / "sweeps" / "rough", jobs, STEPS)
        self.shared_memory = left_in_shared_memory()
        self.calls = 0
        self.command = self.call()

    def call(self) -> Command:
        self.calls += 1
        self.command = Command(self.folder, self.overrides, self.folder / f"call{self.calls}.log")
        return self.command

    def kill(self, number: int, kind: str, wanted: str, due: int) -> Kill:
        """Waits until `due` jobs are ok and for the moment, kills, waits for the effect."""
        self._wait(lambda: self.jobs.done() >= due, 3600, poll=0.2)
        delay = self.rng.uniform(0, 2)  # "any" is any moment of a job's life, the saves included
        began = time.monotonic()
        needed = {"rank": "ranks", "stopped": "ranks", "server": "server"}.get(kind, "command")

        def now() -> bool:
            waited = time.monotonic() - began
            if wanted != "any" and waited < 60 and self.jobs.moment(self.command) != wanted:
                return False  # after a minute it has not come, and any will do
            return waited > delay * (wanted == "any") and bool(self.command.family()[needed])

        self._wait(now, 180)
        kill = Kill(number, kind, self.jobs.current(), self.jobs.moment(self.command))
        before = self.jobs.results(kill.job)
        family = self.command.family()
        self._strike(kind, family)
        self._effect(kill, before, family)
        return kill

    def _wait(self, condition: Callable[[], bool], seconds: float, poll: float = 0.005) -> None:
        """Until `condition`; the command is called again when it has ended. Gives up after `seconds`."""
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            self.jobs.watch()
            if self.command.ended():
                if self.command.code == 0:
                    return
                self.call()
            time.sleep(poll)

    def _strike(self, kind: str, family: dict[str, list[int]]) -> None:
        targets = {
            "rank": self.rng.sample(family["ranks"], min(1, len(family["ranks"]))),
            "stopped": self.rng.sample(family["ranks"], min(1, len(family["ranks"]))),
            "server": family["server"],
            "command": family["command"],
            "asked": family["command"],
            "all": [pid for pids in family.values() for pid in pids],
        }[kind]
        sent = {"stopped": signal.SIGSTOP, "asked": signal.SIGTERM}.get(kind, signal.SIGKILL)
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)

    def _effect(self, kill: Kill, before: dict[str, Any], family: dict[str, list[int]]) -> None:
        """Waits until what was killed has ended, with all that belongs to it, and notes what is left."""
        began = time.monotonic()
        ends_command = kill.kind in ("command", "all", "asked")
        pids = [pid for pids in family.values() for pid in pids] if ends_command else family["ranks"]

        def over() -> bool:
            if ends_command:
                return self.command.ended() and not any(map(alive, pids))
            told = self.jobs.results(kill.job).get("status") not in (None, "running")
            if kill.kind == "server" and not told:  # killed between jobs, it is missed by none: the next has another
                told = bool(set(self.command.family()["server"]) - set(family["server"]))
            return (told or self.command.ended()) and not any(map(alive, pids))

        while not over():
            self.jobs.watch()
            if time.monotonic() - began > EFFECT_S:
                kill.left = [f"process {pid}" for pid in pids if alive(pid)]
                self.command.end()
                return
            time.sleep(0.01)
        kill.seconds = round(time.monotonic() - began, 2)
        results = self.jobs.results(kill.job)
        own = results != before and results.get("status") not in (None, "running")
        kill.said = f"{results['status']}: {results['error']}" if own else self.command.last_line()
        if self.command.ended():
            kill.left += self.command.left() + self.new_in_shared_memory()

    def new_in_shared_memory(self) -> list[str]:
        """After some patience: what has just ended may be about to remove its files."""
        end = time.monotonic() + 5
        while (new := left_in_shared_memory() - self.shared_memory) and time.monotonic() < end:
            time.sleep(0.2)
        self.shared_memory |= new  # told once
        return [f"/dev/shm/{name}" for name in sorted(new)]

    def finish(self) -> int:
        """Calls the sweep until all jobs are ok; returns the last exit code."""
        for _ in range(CALLS):
            if not self.command.ended():
                self._wait(self.command.ended, 3600, poll=0.05)
            if self.command.code == 0:
                break
            self.call()
        self.jobs.watch()
        return self.command.code if self.command.code is not None else 1


def drawn(weights: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def measure(folder: Path, kills: int, jobs: int, seed: int) -> dict[str, Any]:
    """Both sweeps, and how they compare."""
    rng = random.Random(seed)
    began = time.monotonic()
    calm = Command(folder, ["-m", "sweep.name=calm", *settings(jobs)], folder / "calm.log")
    if calm.wait(3600) != 0:
        raise SystemExit(f"the undisturbed sweep failed: {calm.last_line()}")
    calm_seconds = time.monotonic() - began
    print(f"undisturbed: {jobs} jobs in {calm_seconds:.0f} s", flush=True)
    began = time.monotonic()
    soak = Soak(folder, jobs, rng)
    made = []
    try:
        for number in range(kills):
            kind, wanted = drawn(KINDS, rng), drawn(MOMENTS, rng)
            made.append(soak.kill(number + 1, kind, wanted, number * (jobs - 1) // kills))
            print(json.dumps(asdict(made[-1])), flush=True)
        code = soak.finish()
    finally:
        soak.command.end()
    left = soak.command.left() + soak.new_in_shared_memory()
    sweeps = folder / "outputs" / "sweeps"
    return {"seed": seed, "jobs": jobs, "exit_code": code, "calls": soak.calls,
            "calm_seconds": calm_seconds, "rough_seconds": time.monotonic() - began,
            "kills": [asdict(kill) for kill in made], "left": left, "lost_checkpoints": soak.jobs.lost,
            "differences": differences(sweeps / "calm", sweeps / "rough")}  # fmt: skip


def holds(report: dict[str, Any]) -> bool:
    """Whether all that the soak is to show is so."""
    troubles = report["left"] + report["lost_checkpoints"] + report["differences"]
    return report["exit_code"] == 0 and not troubles and all(
        kill["seconds"] is not None and not kill["left"] for kill in report["kills"]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=200, help="a multiple of 4")
    parser.add_argument("--seed", type=int, default=0, help="of the generator that draws the kills")
    parser.add_argument("--folder", type=Path, help="keep the sweeps there, and write the table there")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(folder.resolve(), arguments.kills, arguments.jobs // 4 * 4, arguments.seed)
    out = arguments.folder or ROOT / "benchmarks" / "results"
    (out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "soak.md").write_text(markdown(report))
    print(markdown(report))
    return 0 if holds(report) else 1


if __name__ == "__main__":
    sys.exit(main())

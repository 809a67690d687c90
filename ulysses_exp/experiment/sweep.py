"""A multirun's jobs: which are done already, how far the sweep is, and what became of each.

Hydra's own launcher runs the jobs one after another in this process, so the server that ranks are forks of stays warm
between them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ulysses_exp.config import Config
from ulysses_exp.config.received.sources import newest_manifests
from ulysses_exp.launch.run_folder import settled
from ulysses_exp.report.units import of_seconds

#: Settings of a job that do not change its result
_NOT_PART_OF_THE_RESULT = ("sweep", "tracker", "launch", "optimize")


def fingerprint(config: Config) -> str:
    """Two jobs with the same fingerprint give the same result: the same settings, and the same source if any."""
    plain = {key: value for key, value in asdict(config).items() if key not in _NOT_PART_OF_THE_RESULT}
    del plain["checkpoint"]["on_signal_s"]
    if config.checkpoint.source is not None:  # trained again, it is another one
        plain["source"] = [path.read_text() for path in newest_manifests(config.checkpoint.source)]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def finished(config: Config, folder: Path) -> bool:
    """Whether an earlier run of this job went well and need not be repeated.

    `sweep.rerun` says what else is repeated: `changed` (default) what was configured differently, `failed` nothing,
    `all` everything.
    """
    try:
        earlier = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return False
    if config.sweep.rerun == "all" or earlier.get("status") != "ok":
        return False
    return config.sweep.rerun == "failed" or earlier.get("fingerprint") == fingerprint(config)


def objective(metric: str | None, results: dict[str, Any]) -> float | None:
    """What a job returns to a sweeper that searches: the figure that `optimize.metric` names, of a list the last.

    None without a metric, and where a job failed and has no such figure: the sweeper then counts the trial as failed.
    """
    node: Any = results.get("stages", {})
    for name in metric.split(".") if metric else ():
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, list):
        node = node[-1] if node else None
    return float(node) if metric and isinstance(node, (int, float)) else None


def skipped(cfg: DictConfig | Config, reason: str) -> dict[str, Any]:
    """results.json of a job whose combination of settings cannot run."""
    sp, dp, zero = cfg.sp.size, cfg.dp.size, cfg.zero.stage
    layout = {"world": sp * dp, "sp": sp, "dp": dp, "zero": zero, "name": f"sp{sp}-dp{dp}-z{zero}"}
    return {"schema_version": 1, "status": "skipped", "error": reason, "layout": layout, "stages": {}}


@dataclass
class Sweep:
    """The outcomes so far; `total` is the number of jobs of a multirun, 1 otherwise."""

    total: int = 1
    outcomes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)  # of each job that was not done already
    folder: Path | None = None  # of the newest job
    _mark: float = field(default_factory=time.monotonic)  # when the last job ended

    def add(self, outcome: str, name: str, reason: str | None, ran: bool = True) -> None:
        """Records a job. `reason` says why it is not ok; why one was skipped has been said when it was."""
        self.outcomes.append(outcome)
        self.names.add(name)
        now = time.monotonic()
        if ran:
            self.seconds.append(now - self._mark)
        self._mark = now
        if outcome not in ("ok", "skipped"):
            self.failures.append(f"{name}: {outcome}: {reason}")

    def read(self, folder: Path, since: float) -> None:
        """Takes over what jobs that ran elsewhere (`hydra/launcher=submitit_slurm`) have left below `folder`.

        Args:
            since: Unix time; a file that is older tells of an earlier run.
        """
        for path in sorted(folder.glob("*/results.json")):
            if path.parent.name in self.names:
                continue
            results = settled(json.loads(path.read_text()), path.parent)
            ran = path.stat().st_mtime >= since
            if ran or results["status"] == "ok":
                self.add(results["status"], path.parent.name, results["error"], ran)

    def headline(self) -> str:
        """How far the sweep is, e.g. `sweep: 3 of 12 done (2 ok, 1 failed), job 4 running, 1:10 min left`."""
        done = len(self.outcomes)
        text = f"sweep: {done} of {self.total} done"
        if done:
            text += f" ({self.counts()})"
        text += f", job {done + 1} running"
        if self.seconds:
            typical = statistics.mean(self.seconds[1:] or self.seconds)  # the first has also started the server
            text += f", {of_seconds(typical * (self.total - done))} left"
        return text

    def counts(self) -> str:
        """Jobs by outcome, e.g. `2 ok, 1 failed`."""
        return ", ".join(f"{number} {outcome}" for outcome, number in Counter(self.outcomes).items())

    def summary(self) -> str:
        """The whole sweep in a line, and a line for each job that failed."""
        text = f"sweep: {self.counts() or 'no job ended'}"
        if missing := self.total - len(self.outcomes):
            text += f", {missing} not run"
        return "\n".join([text, *(f"  {failure}" for failure in self.failures)])

    def exit_code(self) -> int:
        """0 all ok or skipped, 1 a job failed, 2 no job could run, 130 interrupted."""
        if "interrupted" in self.outcomes:
            return 130
        if "failed" in self.outcomes:
            return 1
        return 2 if self.outcomes and set(self.outcomes) == {"skipped"} else 0

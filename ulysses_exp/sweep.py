"""A multirun's jobs: which are done already, how far the sweep is, and what became of each.

Hydra's own launcher runs the jobs one after another in this process, so the forkserver stays warm between them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ulysses_exp.config import Config

#: Settings of a job that do not change its result
_NOT_PART_OF_THE_RESULT = ("sweep", "tracker", "launch")

_WRITTEN_BY_A_JOB = ("results.json", "metrics.jsonl", "run.log", "ranks", "checkpoints", "wandb", "profile")


def fingerprint(config: Config) -> str:
    """Two jobs with the same fingerprint give the same result."""
    plain = {key: value for key, value in asdict(config).items() if key not in _NOT_PART_OF_THE_RESULT}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def finished(config: Config, folder: Path) -> str | None:
    """The status of an earlier run of this job that need not run again, else None."""
    try:
        earlier = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return None
    same = earlier.get("fingerprint") == fingerprint(config)
    rerun = config.sweep.rerun
    if rerun == "all" or earlier.get("status") != "ok":
        return None
    return "ok" if same or rerun == "failed" else None


def skipped(cfg: DictConfig, reason: str) -> dict[str, Any]:
    """results.json of a job whose combination of settings cannot run."""
    sp, dp, zero = cfg.sp.size, cfg.dp.size, cfg.zero.stage
    layout = {"world": sp * dp, "sp": sp, "dp": dp, "zero": zero, "name": f"sp{sp}-dp{dp}-z{zero}"}
    return {"schema_version": 1, "status": "skipped", "error": reason, "layout": layout, "stages": {}}


def clear(folder: Path) -> None:
    """Removes what an earlier run of the job left in its folder."""
    for name in _WRITTEN_BY_A_JOB:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass
class Sweep:
    """The outcomes so far; `total` is the number of jobs of a multirun, 1 otherwise."""

    total: int = 1
    outcomes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    ran: int = 0  # jobs that were not done already

    def add(self, outcome: str, name: str, reason: str | None, ran: bool = True) -> None:
        """Records a job. `reason` says why it is not ok."""
        self.outcomes.append(outcome)
        self.ran += ran
        if outcome != "ok":
            self.failures.append(f"{name}: {outcome}: {reason}")

    def headline(self) -> str:
        """How far the sweep is, e.g. `job 3/12, 2 ok, 1 failed, 1:10 left`."""
        counts = Counter(self.outcomes)
        parts = [f"job {len(self.outcomes) + 1}/{self.total}", *(f"{n} {outcome}" for outcome, n in counts.items())]
        if self.ran:
            left = (time.monotonic() - self.started) / self.ran * (self.total - len(self.outcomes))
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        return ", ".join(parts)

    def exit_code(self) -> int:
        """0 all ok or skipped, 1 a job failed, 2 no job could run, 130 interrupted."""
        if "interrupted" in self.outcomes:
            return 130
        if "failed" in self.outcomes:
            return 1
        return 2 if self.outcomes and set(self.outcomes) == {"skipped"} else 0


def jobs_of(overrides: list[str]) -> int:
    """How many jobs a multirun with these overrides has."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)
    return sum(len(batch) for batch in batches)

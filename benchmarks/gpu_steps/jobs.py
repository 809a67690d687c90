"""Jobs as a user runs them: `python run.py`, and its results.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_steps.step import Setting

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A command that has ended. `results` is empty where it left none; times in seconds since 1970."""

    folder: Path
    code: int
    began: float
    ended: float
    said: str
    results: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def trouble(self) -> str | None:
        """The error, in words; None where all went well."""
        if self.code == 0:
            return None
        lines = [line for line in self.said.splitlines() if line.strip()]
        return self.results.get("error") or (lines[-1] if lines else f"exit code {self.code}")

    def stage(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.results.get("stages", {}).get(name, {})
        return found


def run(
    setting: Setting,
    name: str,
    *overrides: str,
    one_gpu: bool = False,
    before: Callable[[], None] | None = None,
) -> Job:
    """Runs a job in a folder of the step.

    Args:
        one_gpu: of several GPUs the job sees the first.
        before: called in the new process before it becomes the command.
    """
    folder = setting.folder / name
    command = [sys.executable, str(ROOT / "run.py"), f"hydra.run.dir={folder}", f"device={setting.device}"]
    command += ["tracker.mode=disabled", *overrides]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_SIZE"))}
    if one_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    began = time.time()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=before
    )
    ended, left = time.time(), folder / "results.json"
    results = json.loads(left.read_text()) if left.is_file() else {}
    return Job(folder, done.returncode, began, ended, done.stdout, results)

"""Processes that run the real wandb client, with a home of their own that shows what they leave in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

A_JOB = Path(__file__).with_name("a_job.py")
REPOSITORY = A_JOB.parents[2]


def environment(place: Path) -> dict[str, str]:
    """No W&B settings of the machine; an empty home and temporary folder below `place`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_"))}
    for name in ("home", "tmp"):
        (place / name).mkdir(parents=True, exist_ok=True)
    python_path = f"{REPOSITORY}:{A_JOB.parent}"
    return clean | {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONPATH": python_path}


def track(place: Path, mode: str, *arguments: object, server: str | None = None, **variables: str) -> dict[str, Any]:
    """Runs a_job.py in `place` to its end, tracking in `place/run`: what it printed, its stderr, its `seconds`."""
    surroundings = environment(place) | variables
    if server is not None:
        surroundings |= {"WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40}
    (place / "run").mkdir(exist_ok=True)
    command = [sys.executable, str(A_JOB), mode, str(place / "run"), *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, env=surroundings, cwd=place, capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, f"the client printed: {done.stdout}"
    assert "wandb" not in done.stderr, f"the client printed: {done.stderr}"
    return json.loads(done.stdout) | {"seconds": seconds}


def run_directories(place: Path) -> list[Path]:
    """The client's run directories below `place/run`."""
    return sorted(p for p in (place / "run" / "wandb").glob("*run-*") if not p.is_symlink())


def inspect(run_directory: Path, *options: str) -> str:
    """What `wandb leet inspect --json` prints of a run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run_directory)]
    surroundings = environment(run_directory.parents[2] / "reader")
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, timeout=60).stdout


def records(run_directory: Path) -> list[dict[str, Any]]:
    """A run's records in the order of the file."""
    return [json.loads(line) for line in inspect(run_directory).splitlines()]


def logged(run_directory: Path) -> dict[int, dict[str, Any]]:
    """A run's history by step."""
    return {row["history"]["step"]["num"]: row["history"]["item"] for row in records(run_directory) if "history" in row}

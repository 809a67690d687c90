"""What all tests share: the command as a user runs it, and a machine left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import ROOT


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python run.py <overrides>` in a folder; returns the finished process."""

    def run(
        *overrides: str, cwd: Path, timeout: float = 240, keep: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        dropped = ("WANDB_", "RANK", "WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k in keep or not k.startswith(dropped)}
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *overrides],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run

"""Whether a layout fits this machine, as far as that is known before it is tried."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ulysses_exp.config import Config
from ulysses_exp.experiment.job import Job
from ulysses_exp.layout import Layout
from ulysses_exp.report.units import of_bytes

#: Bytes a parameter on each rank: weights, gradients, AdamW's states, the true gradient, weights around a step
_IN_MEMORY = 32

#: Bytes a parameter of a checkpoint with what is exported and converted of it, and how many are there at once
_ON_DISK = 40


class Room:
    """What is free on this machine beside what a model of so many parameters needs. Nothing is known of others."""

    def __init__(self, job: Job, config: Config, parameters: int):
        self.local = config.launch.name == "local"
        self.parameters, self.folder = parameters, job.folder

    def memory(self, layout: Layout) -> str | None:
        """Why `layout` is not tried; None where its ranks fit."""
        return self._short(layout.world * _IN_MEMORY * self.parameters, _free_memory(), "memory")

    def disk(self, layout: Layout) -> str | None:
        """Why no checkpoint of `layout` is tried; None where it fits."""
        return self._short(_ON_DISK * self.parameters, shutil.disk_usage(self.folder).free, "disk")

    def _short(self, needed: int, free: int | None, what: str) -> str | None:
        if not self.local or free is None or needed <= free:
            return None
        return f"needs about {of_bytes(needed)} of {what}, {of_bytes(free)} are free"


def _free_memory() -> int | None:
    """Bytes of host memory; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None

"""What a step is, and what it is told.

Its module, `gpu_steps.<name>`, has `run(setting, part)`, which yields rows: figures by name, in `_s` seconds, in
`_bytes` bytes; `trouble` is what went wrong, in words. It may have `parts(setting)`, each run in a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where a step runs. `folder` is its own, for what it leaves; `gpus` counts those that it may use."""

    pretend: bool
    gpus: int
    folder: Path

    @property
    def device(self) -> str:
        return "cpu" if self.pretend else "cuda"

    def pick(self, real: T, pretended: T) -> T:
        """Sizes for a GPU, or for pretending."""
        return pretended if self.pretend else real


@dataclass(frozen=True)
class Step:
    """`limit_s` is for all of its parts together; below `gpus` GPUs it is left out."""

    name: str
    question: str
    limit_s: int
    gpus: int = 1

    def parts(self, setting: Setting) -> list[str]:
        module = importlib.import_module(f"gpu_steps.{self.name}")
        return module.parts(setting) if hasattr(module, "parts") else [""]

    def run(self, setting: Setting, part: str) -> Iterator[Row]:
        return importlib.import_module(f"gpu_steps.{self.name}").run(setting, part)

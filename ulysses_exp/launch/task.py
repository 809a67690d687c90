"""What the parent asks of a group of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config
from ulysses_exp.layout import Layout


@dataclass(frozen=True)
class Task:
    """`work` names functions of `ulysses_exp.worker.WORK`, run in this order in one session at `config.layout`.

    Rank 0 leaves the result of each at `results / <work>.json`.
    """

    name: str
    config: Config
    work: tuple[str, ...]
    folder: Path  # the run folder
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.config.layout

    @property
    def results(self) -> Path:
        """Where the ranks of this task leave results, logs and errors."""
        return self.folder / "ranks" / self.name

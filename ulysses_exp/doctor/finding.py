"""What the doctor was asked, and what it found: a line each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config

STATES = ("ok", "warning", "wrong")  # from good to bad


@dataclass(frozen=True)
class Asked:
    """The jobs that are to run here: their configuration, their ranks, the folder that their run folders lie in."""

    config: Config
    ranks: int
    outputs: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))  # before ranks' settings are made


@dataclass(frozen=True)
class Finding:
    """`said` tells what is there, `mend` what to do about it. `wrong`: jobs as asked for will not run."""

    name: str
    state: str  # one of STATES
    said: str
    mend: str = ""
    figures: dict[str, Any] = field(default_factory=dict)  # for --json


def ok(name: str, said: str, **figures: Any) -> Finding:
    return Finding(name, "ok", said, figures=figures)


def warning(name: str, said: str, mend: str) -> Finding:
    return Finding(name, "warning", said, mend)


def wrong(name: str, said: str, mend: str) -> Finding:
    return Finding(name, "wrong", said, mend)


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder

"""A figure of a run in the report's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_exp.report.runs import Run

#: Titles of the columns that say which run is best
LOSS, SPEED, PLANNED = "loss", "tokens/s", "planned longest"


@dataclass(frozen=True)
class Column:
    """A figure of a run: `value` is what one sorts by, `text` how it is written."""

    title: str
    value: Callable[[Run], Any]
    text: Callable[[Any], str]
    narrow: bool = True  # also where there is room for few columns

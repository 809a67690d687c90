"""How stages show their results, each in a module of its own (`Stage.view`), which has of these what it needs:

    facts(result, arrow) -> list[Fact]      lines of a summary; without it, why the stage is not ok
    tables(result, arrow) -> list[Shown]    tables of a summary
    lines(result) -> Iterable[dict]         lines of metrics.jsonl, written when the result is there
    SHAPE: dict[str, Reader]                what the report reads of the result, and of which type that is
    COLUMNS: Sequence[Column]               of the report's tables

`result` is the stage's entry in results.json; of a job that failed, half of it may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ulysses_exp.config import stages
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.plain_table import Shown
from ulysses_exp.report.shape import Reader


def _of(name: str, what: str) -> Any:
    """`what` of the view of the stage called `name`; None where it has none, or no such stage is installed here."""
    try:
        place = stages.stage(name).view
    except ConfigError:
        return None
    return None if place is None else getattr(stages.resolve(place), what, None)


def facts(name: str, result: Mapping[str, Any], arrow: str) -> list[Fact]:
    """Lines of a summary. A view that raises says so there: what a job came to is on disk, and is no failure."""
    of_stage = _of(name, "facts")
    if of_stage is None:
        return trouble(name, result)
    try:
        shown: list[Fact] = of_stage(result, arrow)
    except Exception as error:
        return [*trouble(name, result), (name, f"cannot be shown ({type(error).__name__}: {error})")]
    return shown


def tables(name: str, result: Mapping[str, Any], arrow: str) -> list[Shown]:
    """Tables of a summary."""
    of_stage = _of(name, "tables")
    return [] if of_stage is None else of_stage(result, arrow)


def lines(name: str, result: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    of_stage = _of(name, "lines")
    return () if of_stage is None else of_stage(result)


def shape(name: str) -> dict[str, Reader]:
    """What the report reads of the result of the stage called `name`."""
    return _of(name, "SHAPE") or {}


def columns() -> list[Any]:
    """Of the report's tables, each a `column.Column`."""
    return [column for stage in stages.installed() for column in _of(stage.name, "COLUMNS") or ()]

"""One row a run: what the report's tables show, and how each figure is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ulysses_exp.report import views
from ulysses_exp.report.column import LOSS, PLANNED, SPEED, Column
from ulysses_exp.report.runs import Run, setting_text
from ulysses_exp.report.traits import LAYOUT, differing, heading


@dataclass(frozen=True)
class Table:
    """Columns that at least one run has a figure for; each cell as (value, text)."""

    titles: list[str]
    rows: list[list[tuple[Any, str]]]
    commands: list[str | None] = field(default_factory=list)  # of each row's run
    settings: int = 0  # as many columns after the first are settings in which the runs differ; then comes the status


def _columns() -> list[Column]:
    return [Column("status", lambda r: r.status, str), *views.columns()]


def table(runs: list[Run], narrow: bool = False) -> Table:
    """The figures of `runs` in their order; with `narrow` those that fit a terminal."""
    every = _columns()
    names = [name for name in differing(runs) if name not in LAYOUT]
    layouts = [run.layout.name if run.layout else run.name for run in runs]
    told_apart = [
        (layout, *(run.traits.get(name) for name in names)) for layout, run in zip(layouts, runs, strict=True)
    ]
    count = Counter(told_apart)
    values = {column.title: [column.value(run) for run in runs] for column in every if column.narrow or not narrow}
    columns = [
        column for column in every if any(value is not None for value in values.get(column.title, ()))
    ]  # fmt: skip
    rows = []
    for number, (run, layout, mark) in enumerate(zip(runs, layouts, told_apart, strict=True)):
        name = layout if count[mark] == 1 else f"{layout} ({run.place})"
        row: list[tuple[Any, str]] = [(name, name)]
        for trait, text in zip(names, mark[1:], strict=True):
            if trait == "seq_len":
                row.append((run.seq_len, f"{run.seq_len or 0:,}"))
            else:
                value = text if trait == "model" else run.setting(trait)
                row.append((value, "-" if value is None else setting_text(value)))
        for column in columns:
            value = values[column.title][number]
            row.append((value, "-" if value is None else column.text(value)))
        rows.append(row)
    headings = ["layout", *map(heading, names), *(column.title for column in columns)]
    return Table(headings, rows, [run.command for run in runs], len(names))


def best_first(runs: list[Run]) -> tuple[list[Run], str]:
    """`runs` with the best at the top, and the title of the column that says which is best.

    That is the loss where settings change it, else the speed, else the longest planned sequence. What is not ok comes
    last.
    """
    losses = [run.last_loss for run in runs if run.last_loss is not None]
    key: Callable[[Run], float | None]
    if len({run.experiment for run in runs}) > 1 and losses and max(losses) - min(losses) > 1e-6 * max(losses):
        title, key, sign = LOSS, lambda run: run.last_loss, 1
    elif any(run.figure("train.tokens_per_second") for run in runs):
        title, key, sign = SPEED, lambda run: run.figure("train.tokens_per_second"), -1
    else:
        title, key, sign = PLANNED, lambda run: run.figure("plan.max_seq_len"), -1

    def place(run: Run) -> tuple[bool, bool, float]:
        figure = key(run)
        return run.status != "ok", figure is None, sign * (figure or 0.0)

    return sorted(runs, key=place), title

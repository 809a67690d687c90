"""One row a run: what the report's tables show, and how each figure is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ulysses_exp.report.runs import Run, setting_text
from ulysses_exp.report.traits import LAYOUT, differing, heading
from ulysses_exp.report.units import of_bytes, of_count, of_difference, of_loss, of_seconds


@dataclass(frozen=True)
class Column:
    """A figure of a run: `value` is what one sorts by, `text` how it is written."""

    title: str
    value: Callable[[Run], Any]
    text: Callable[[Any], str]
    narrow: bool = True  # also where there is room for few columns


@dataclass(frozen=True)
class Table:
    """Columns that at least one run has a figure for; each cell as (value, text)."""

    titles: list[str]
    rows: list[list[tuple[Any, str]]]
    commands: list[str | None] = field(default_factory=list)  # of each row's run
    settings: int = 0  # as many columns after the first are settings in which the runs differ; then comes the status


def _last_loss(run: Run) -> float | None:
    return math.nan if run.diverged and run.last_loss is None else run.last_loss


def _eval_difference(run: Run) -> float | None:
    bypass, sp = run.figure("eval.bypass.loss"), run.figure("eval.sp.loss")
    return None if bypass is None or sp is None else abs(bypass - sp)


def _exact_cells(run: Run) -> tuple[int, int] | None:
    cells = run.figure("reload.cells")
    return (sum(cell.get("status") == "ok" for cell in cells), len(cells)) if cells else None


def _parity(run: Run) -> float | None:
    differences = [run.figure(f"parity.max_rel_{kind}_diff") for kind in ("loss", "grad_norm", "weight")]
    return max((d for d in differences if d is not None), default=None)


LOSS, SPEED, PLANNED = "loss", "tokens/s", "planned longest"
_COLUMNS = (
    Column("status", lambda r: r.status, str),
    Column("steps", lambda r: len(r.losses) or None, str, narrow=False),
    Column(LOSS, _last_loss, lambda loss: "not finite" if math.isnan(loss) else of_loss(loss)),
    Column(SPEED, lambda r: r.figure("train.tokens_per_second"), of_count),
    Column("step", lambda r: r.figure("train.step_time_s.median"), of_seconds),
    Column("p90", lambda r: r.figure("train.step_time_s.p90"), of_seconds, narrow=False),
    Column("MFU", lambda r: r.figure("train.mfu"), lambda share: f"{share:.1%}", narrow=False),
    Column("HFU", lambda r: r.figure("train.hfu"), lambda share: f"{share:.1%}", narrow=False),
    Column("memory", lambda r: r.figure("train.peak_memory_bytes.max"), of_bytes),
    Column("all-to-all / step", lambda r: r.figure("train.communication.all_to_all_bytes_per_step"), of_bytes, False),
    Column("eval loss, bypass", lambda r: r.figure("eval.bypass.loss"), of_loss, narrow=False),
    Column("eval loss, sp", lambda r: r.figure("eval.sp.loss"), of_loss, narrow=False),
    Column("bypass - sp", _eval_difference, of_difference, narrow=False),
    Column("reload", _exact_cells, lambda cells: f"{cells[0]}/{cells[1]}"),
    Column("parity", _parity, of_difference, narrow=False),
    Column("planned memory", lambda r: r.figure("plan.peak_memory_bytes_per_rank.total"), of_bytes, narrow=False),
    Column("longest sequence", lambda r: r.figure("train.max_seq_len"), lambda tokens: f"{tokens:,}"),
    Column(PLANNED, lambda r: r.figure("plan.max_seq_len"), lambda tokens: f"{tokens:,}", narrow=False),
)


def table(runs: list[Run], narrow: bool = False) -> Table:
    """The figures of `runs` in their order; with `narrow` those that fit a terminal."""
    names = [name for name in differing(runs) if name not in LAYOUT]
    layouts = [run.layout.name if run.layout else run.name for run in runs]
    told_apart = [
        (layout, *(run.traits.get(name) for name in names)) for layout, run in zip(layouts, runs, strict=True)
    ]
    count = Counter(told_apart)
    values = {column.title: [column.value(run) for run in runs] for column in _COLUMNS if column.narrow or not narrow}
    columns = [
        column for column in _COLUMNS if any(value is not None for value in values.get(column.title, ()))
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

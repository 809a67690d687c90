"""One row a run: what the report's tables show, and how each figure is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_exp.report.runs import Run, differing, labels, traits
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


def _last_loss(run: Run) -> float | None:
    return list(run.losses.values())[-1] if run.losses else None


def _eval_difference(run: Run) -> float | None:
    bypass, sp = run.figure("eval.bypass.loss"), run.figure("eval.sp.loss")
    return None if bypass is None or sp is None else abs(bypass - sp)


def _exact_cells(run: Run) -> tuple[int, int] | None:
    cells = run.figure("reload.cells")
    return (sum(cell.get("status") == "ok" for cell in cells), len(cells)) if cells else None


def _parity(run: Run) -> float | None:
    differences = [run.figure(f"parity.max_rel_{kind}_diff") for kind in ("loss", "grad_norm", "weight")]
    return max((d for d in differences if d is not None), default=None)


_COLUMNS = (
    Column("status", lambda r: r.status, str),
    Column("steps", lambda r: len(r.losses) or None, str, narrow=False),
    Column("loss", _last_loss, of_loss),
    Column("tokens/s", lambda r: r.figure("train.tokens_per_second"), of_count),
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
    Column("planned longest", lambda r: r.figure("plan.max_seq_len"), lambda tokens: f"{tokens:,}", narrow=False),
)


def table(runs: list[Run], narrow: bool = False) -> Table:
    """The figures of `runs`; with `narrow` those that fit a terminal."""
    names = [name for name in differing(runs) if name not in ("sp", "dp", "zero")]
    layouts = [run.layout.name if run.layout else run.folder.name for run in runs]
    told_apart = [
        (layout, *(traits(run).get(name) for name in names)) for layout, run in zip(layouts, runs, strict=True)
    ]
    columns = [
        column
        for column in _COLUMNS
        if (column.narrow or not narrow) and any(column.value(run) is not None for run in runs)
    ]
    rows = []
    for run, layout, mark in zip(runs, layouts, told_apart, strict=True):
        name = layout if told_apart.count(mark) == 1 else f"{layout} ({run.place})"
        row: list[tuple[Any, str]] = [(name, name)]
        for trait, text in zip(names, mark[1:], strict=True):
            if trait == "seq_len":
                row.append((run.seq_len, f"{run.seq_len or 0:,}"))
            else:
                value = run.setting(trait) if "." in trait else text
                row.append((value, "-" if value is None else str(value)))
        for column in columns:
            value = column.value(run)
            row.append((value, "-" if value is None else column.text(value)))
        rows.append(row)
    headings = ["tokens" if name == "seq_len" else name.removesuffix(".name").rsplit(".", 1)[-1] for name in names]
    return Table(["layout", *headings, *(column.title for column in columns)], rows)


def troubles(runs: list[Run]) -> list[tuple[str, str]]:
    """(run, reason) for everything that is not ok: jobs, stages and reload cells."""
    found = []
    for label, run in zip(labels(runs), runs, strict=True):
        if run.status in ("unfinished", "running"):
            found.append((label, f"has not finished; {len(run.losses)} steps so far"))
            continue
        if run.status in ("skipped", "interrupted"):
            found.append((label, f"{run.status}: {run.results.get('error') or 'no reason given'}"))
        reasons = []
        for name, stage in run.results.get("stages", {}).items():
            cells = [cell for cell in stage.get("cells") or [] if cell.get("status") != "ok"]
            for cell in cells:
                reasons.append(f"reload at {cell.get('target')} by {cell.get('route')}: {cell.get('reason')}")
            if stage.get("status") != "ok" and not cells:
                reasons.append(f"stage {name}: {stage.get('reason', 'no reason given')}")
        if run.status == "failed" and not reasons:
            reasons.append(str(run.results.get("error") or "no reason given"))
        found += [(label, " ".join(reason.split())) for reason in reasons]
    return found

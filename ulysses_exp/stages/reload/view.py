"""How the result of stage `reload` is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from ulysses_exp.report.column import Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.plain_table import Shown, figures_table
from ulysses_exp.report.runs import Run
from ulysses_exp.report.shape import each, fields, flag, number, reason, short, status
from ulysses_exp.report.units import of_difference, of_seconds

SHAPE = {
    "cells": each(
        fields(
            source=short, target=short, route=short, status=status, reason=reason, weights_bit_exact=flag,
            optimizer_bit_exact=flag, seconds=number, continuation_max_abs_loss_diff=number,
        ),
        4096,
    ),
}  # fmt: skip


def _exact_cells(run: Run) -> tuple[int, int] | None:
    cells = run.figure("reload.cells")
    return (sum(cell.get("status") == "ok" for cell in cells), len(cells)) if cells else None


COLUMNS = (Column("reload", _exact_cells, lambda cells: f"{cells[0]}/{cells[1]}"),)


def lines(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line of metrics.jsonl: how long it took."""
    if "cells" in stage:
        step = int(Path(stage["checkpoint"]).name.removeprefix("step"))
        yield {"step": step, "reload/seconds": sum(cell["seconds"] for cell in stage["cells"])}


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """Why it is not ok, where no cell says so."""
    return [] if stage.get("cells") else trouble("reload", stage)


def tables(stage: Mapping[str, Any], arrow: str) -> list[Shown]:
    """A row a cell."""
    cells = stage.get("cells") or []
    if not cells:
        return []
    table = figures_table(f"reload {arrow}", "route", "weights", "optimizer", "continuation", "time")
    reasons = []
    for cell in cells:
        ok = cell.get("status") == "ok"
        if not ok:
            reasons.append(f"{cell.get('target')} by {cell.get('route')}: {cell.get('reason') or cell.get('status')}")
        table.add_row(
            str(cell.get("target")),
            str(cell.get("route")),
            _exact(cell.get("weights_bit_exact")) if ok else Text("failed", style="bold red"),
            _exact(cell.get("optimizer_bit_exact")) if ok else "",
            of_difference(cell.get("continuation_max_abs_loss_diff")) if ok else "",
            of_seconds(cell.get("seconds")),
        )
    sources = sorted({str(cell.get("source")) for cell in cells})
    return [
        (table, [f"saved at {', '.join(sources)}; continuation: loss difference to the run that went on", *reasons])
    ]


def _exact(value: bool | None) -> Text:
    if value is None:
        return Text("-")
    return Text("bit-exact", style="green") if value else Text("differs", style="bold red")

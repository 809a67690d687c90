"""How the result of stage `eval` is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ulysses_exp.report.column import Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.plain_table import Shown, figures_table
from ulysses_exp.report.runs import Run
from ulysses_exp.report.shape import fields, number, whole
from ulysses_exp.report.units import of_count, of_difference, of_loss

_EVALUATED = fields(loss=number, all_to_all_calls=whole, tokens_per_second=number)
SHAPE = {"bypass": _EVALUATED, "sp": _EVALUATED, "max_abs_logit_diff": number}


def _difference(run: Run) -> float | None:
    bypass, sp = run.figure("eval.bypass.loss"), run.figure("eval.sp.loss")
    return None if bypass is None or sp is None else abs(bypass - sp)


COLUMNS = (
    Column("eval loss, bypass", lambda r: r.figure("eval.bypass.loss"), of_loss, narrow=False),
    Column("eval loss, sp", lambda r: r.figure("eval.sp.loss"), of_loss, narrow=False),
    Column("bypass - sp", _difference, of_difference, narrow=False),
)


def lines(stage: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line of metrics.jsonl a mode."""
    for name in ("bypass", "sp"):
        if name in stage:
            yield {"step": stage["step"], f"eval/{name}/loss": stage[name]["loss"]}


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """Why it is not ok."""
    return trouble("eval", stage)


def tables(stage: Mapping[str, Any], arrow: str) -> list[Shown]:
    """A row a mode."""
    modes = [mode for mode in ("bypass", "sp") if stage.get(mode)]
    if not modes:
        return []
    table = figures_table("eval", "loss", "perplexity", "all-to-all", "tokens/s")
    for mode in modes:
        row = stage[mode]
        table.add_row(
            mode,
            of_loss(row.get("loss")),
            of_count(row.get("perplexity")),
            of_count(row.get("all_to_all_calls")),
            of_count(row.get("tokens_per_second")),
        )
    if stage.get("max_abs_logit_diff") is None:
        return [(table, [])]
    return [(table, [f"largest difference of a logit: {of_difference(stage['max_abs_logit_diff'])}"])]

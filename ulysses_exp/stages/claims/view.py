"""How the result of stage `claims` is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from ulysses_exp.report.column import Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.plain_table import Shown, figures_table
from ulysses_exp.report.runs import Run
from ulysses_exp.report.shape import fields, flag, name, named, reason, whole
from ulysses_exp.stages.claims.cell import DOES_NOT, HOLDS, HOLDS_IF
from ulysses_exp.stages.claims.sentences import CLAIMS, SIDES

_CELL = {"verdict": name, "figure": reason, "why": reason, "finding": whole}
_DETAILS = {"bytes": named(whole, 8), "opened": named(flag, 256)}
_SIDE = fields(**_CELL, cells=named(fields(**_CELL, **_DETAILS), 256))

SHAPE = {claim.key: fields(claim=reason, upstream=_SIDE, here=_SIDE) for claim in CLAIMS}

_STYLE = {HOLDS: "green", HOLDS_IF: "yellow", DOES_NOT: "bold red"}


def _holding(run: Run) -> tuple[int, int, int] | None:
    verdicts = [[run.figure(f"claims.{claim.key}.{side}.verdict") for claim in CLAIMS] for side in SIDES]
    if not any(verdicts[0]):
        return None
    return verdicts[0].count(HOLDS), verdicts[1].count(HOLDS), len(CLAIMS)


COLUMNS = (Column("claims that hold", _holding, lambda n: f"upstream {n[0]}, here {n[1]} of {n[2]}", narrow=False),)


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """Why there are none."""
    return trouble("claims", stage)


def tables(stage: Mapping[str, Any], arrow: str) -> list[Shown]:
    """Two rows a claim; below, where a claim does not hold everywhere, if what, or what happens instead."""
    if not any(claim.key in stage for claim in CLAIMS):
        return []
    table = figures_table("claim", "", "verdict", "figure")
    for column in table.columns[1:]:
        column.justify = "left"
    table.columns[-1].no_wrap = False
    remarks: dict[str, list[str]] = {}  # the claims, by what is remarked
    for claim in CLAIMS:
        entry = stage.get(claim.key) or {}
        for which, label in zip(SIDES, (f"{claim.key} {claim.short}", ""), strict=True):
            side = entry.get(which) or {}
            verdict = str(side.get("verdict", "-"))
            table.add_row(label, which, Text(verdict, style=_STYLE.get(verdict, "")), str(side.get("figure", "-")))
            if side.get("why"):
                finding = f" (docs/findings.md, {side['finding']})" if side.get("finding") else ""
                remarks.setdefault(f"{which} {verdict}: {side['why']}{finding}", []).append(claim.key)
    return [(table, [f"{', '.join(keys)} {remark}" for remark, keys in remarks.items()])]

"""results.json as the report's views use it."""

from __future__ import annotations

from typing import Any

from ulysses_exp.report import views
from ulysses_exp.report.plain import line
from ulysses_exp.report.shape import NAME, Findings, fields, kind, name, needed, number, place, reason, status, whole


def _stages(value: Any, where: str, found: Findings) -> dict[str, Any]:
    """The entry of each stage; of one that has no figures here its status and reason."""
    if not isinstance(value, dict) or len(value) > 40:
        found.wrong(where, f"is {kind(value)}, not a dictionary of stages")
        return {}
    stages = {}
    for key, entry in value.items():
        readers = {"status": status, "reason": reason, **views.shape(key)}
        of_stage = needed(fields(**readers))(entry, place(where, line(key, NAME)), found)
        if of_stage is not None:
            stages[line(key, NAME)] = of_stage
    return stages


_RESULTS = fields(
    status=needed(status),
    error=reason,
    started=number,
    layout=needed(fields(sp=whole, dp=whole, zero=whole)),
    model=needed(fields(name=name)),
    stages=_stages,
)


def results(content: Any, found: Findings) -> dict[str, Any]:
    """The content of results.json as views use it: `stages` is always there, each of its entries a dictionary."""
    if not isinstance(content, dict):
        found.wrong("", f"is {kind(content)}, not a dictionary")
        content = {}
    elif "status" not in content:
        found.wrong("", "says no status")
    return {"stages": {}, **(_RESULTS(content, "", found) or {})}

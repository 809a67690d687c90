"""The report of the steps as markdown."""

from __future__ import annotations

from typing import Any

from gpu_steps.step import Row
from ulysses_exp.report.units import of_bytes, of_seconds

LAST = ("trouble",)  # columns that come last whatever comes first


def document(report: dict[str, Any]) -> str:
    """All steps: first what became of each, then their rows."""
    machine = report["machine"]
    pretended = machine["device"] == "pretended"
    title = "Pretended: tiny shapes on the CPU, to try the script" if pretended else machine["device"]
    lines = [
        f"# On a GPU: {title}",
        "",
        f"`python benchmarks/gpu.py`, {report['date']}"
        + (f", commit {machine['commit']}" if machine.get("commit") else "")
        + ".",
        "",
        f"- devices: {len(machine['devices'])} ({'; '.join(sorted(set(machine['devices']))) or 'none'})",
        f"- driver: {machine['driver']}",
        f"- versions: {', '.join(f'{n} {v}' for n, v in machine['versions'].items())}",
        f"- machine: {machine['system']}",
        *(f"- note: {note}" for note in report["notes"]),
        "",
        "| step | asks | became | took |",
        "| --- | --- | --- | ---: |",
    ]
    for name, entry in report["steps"].items():
        took = of_seconds(entry["seconds"]) if entry["seconds"] else ""
        lines.append(f"| {name} | {entry['question']} | {_cell('', entry['state'])} | {took} |")
    for name, entry in report["steps"].items():
        if entry["rows"]:
            lines += ["", f"## {name}", "", *rows(entry["rows"])]
    return "\n".join(lines) + "\n"


def rows(found: list[Row]) -> list[str]:
    """A table with the union of the rows' names as columns."""
    names = list(dict.fromkeys(name for row in found for name in row))
    names = [n for n in names if n not in LAST] + [n for n in LAST if any(row.get(n) for row in found)]
    titles = [name.removesuffix("_s").removesuffix("_bytes").replace("_", " ") for name in names]
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in found:
        lines.append("| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |")
    return lines


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and name.endswith("_bytes"):
        return of_bytes(value)
    if isinstance(value, (int, float)) and name.endswith("_s"):
        return of_seconds(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")[:300]

"""docs/models.md, from what `models.py` found."""

from __future__ import annotations

from collections import Counter
from typing import Any

RESULTS = ("right", "refused", "wrong", "crashed", "not buildable")


def markdown(report: dict[str, Any], of: int) -> str:
    types = report["types"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    count = Counter(one["result"] for one in types.values())
    dates = sorted({one["date"] for one in types.values()})
    tried = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        "# Which models run right",
        "",
        "Every type of causal LM that transformers has, built tiny and run under `ulysses()` over 2 and 4 ranks: "
        "plain, packed, padded on the right and on the left, and without position_ids. Logits and the gradient of all "
        "parameters are held against one process of the unpatched model that reads each document alone, to 1e-5 "
        f"(`python benchmarks/models.py`, which writes this page; {versions}; {tried}; CPU, gloo, fp32).",
        "",
        f"Of {of} types " + ", ".join(f"{count[result]} {result}" for result in RESULTS) + ". "
        "*Refused* is said before a number can be wrong; *wrong* is said by nobody; *not buildable* has no tiny copy "
        "that one process can run.",
        "",
        "| type | | layers | why |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in types.items():
        why = one["reason"].replace("|", "\\|")
        lines.append(f"| {name} | {one['result']} | {', '.join(one.get('layers', []))} | {why} |")
    return "\n".join(lines) + "\n"

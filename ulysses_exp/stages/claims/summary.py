"""The cells of a claim on one side in one line."""

from __future__ import annotations

from typing import Any

from ulysses_exp.layout import Layout
from ulysses_exp.stages.claims.cell import DOES_NOT, HOLDS, HOLDS_IF, NOT_TRIED, VERDICTS, Cell
from ulysses_exp.stages.claims.layouts import in_words


def summary(cells: list[Cell], every: list[Layout]) -> dict[str, Any]:
    """`verdict`, the `figure` and the reason of the cell that tells most, and its `finding`.

    What holds at every layout holds; what holds at some holds if the layout is one of them.
    """
    by_verdict = {v: [cell for cell in cells if cell.verdict == v] for v in VERDICTS}
    tried = [layout for layout in every if layout.name not in {cell.layout for cell in by_verdict[NOT_TRIED]}]
    if not tried or not cells:
        return {"verdict": NOT_TRIED, "figure": "-", "why": cells[0].why if cells else "nothing was counted"}
    telling = max(cells, key=lambda cell: (_WEIGHT[cell.verdict], cell.layout))
    if telling.details.get("kinds") and (by_verdict[DOES_NOT] or by_verdict[HOLDS_IF]):
        return _by_kind(cells)
    found: dict[str, Any] = {"figure": telling.figure}
    if telling.finding is not None:
        found["finding"] = telling.finding
    good = _layouts(by_verdict[HOLDS])
    partly = _layouts(by_verdict[HOLDS_IF])
    if by_verdict[DOES_NOT]:
        found["verdict"] = HOLDS_IF if good or partly else DOES_NOT
        where = in_words(good + partly, tried) if good or partly else ""
        bad = in_words(_layouts(by_verdict[DOES_NOT]), tried)
        found["why"] = f"{where} (not at {bad}: {telling.why})" if where else telling.why
    elif partly:
        found["verdict"] = HOLDS_IF
        found["why"] = telling.why if len(partly) == len(tried) else f"at {in_words(partly, tried)}: {telling.why}"
    else:
        found["verdict"] = HOLDS
    if by_verdict[NOT_TRIED]:
        untried = in_words(_layouts(by_verdict[NOT_TRIED]), every)
        found["why"] = "; ".join(filter(None, (found.get("why"), f"not tried at {untried}")))
    return found


def _by_kind(cells: list[Cell]) -> dict[str, Any]:
    """Of checkpoints: in which kinds of layout all of them open, whatever layout they are of."""
    kinds: dict[str, list[int]] = {}
    for cell in cells:
        for kind, (good, of) in cell.details.get("kinds", {}).items():
            before = kinds.get(kind, [0, 0])
            kinds[kind] = [before[0] + good, before[1] + of]
    figure = ", ".join(f"{kind}: {good} of {of}" for kind, (good, of) in kinds.items())
    always = [kind for kind, (good, of) in kinds.items() if good == of]
    bad = max((cell for cell in cells if cell.verdict != HOLDS), key=lambda cell: cell.layout)
    found = {"verdict": HOLDS_IF if always else DOES_NOT, "figure": f"{figure} open bit for bit"}
    why = f"e.g. {bad.layout} {bad.why}"
    found["why"] = f"{' or '.join(always)} (else not in every layout; {why})" if always else why
    return found | ({"finding": bad.finding} if bad.finding is not None else {})


_WEIGHT = {NOT_TRIED: 0, HOLDS: 1, HOLDS_IF: 2, DOES_NOT: 3}


def _layouts(cells: list[Cell]) -> list[Layout]:
    return [Layout.parse(cell.layout) for cell in cells]

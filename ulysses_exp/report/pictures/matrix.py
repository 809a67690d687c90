"""Source layout by target layout: does everything come back bit for bit?"""

from __future__ import annotations

from collections import Counter
from typing import Any

from matplotlib.patches import Patch, Rectangle

from ulysses_exp.layout import Layout
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import COLOURS, INK, figure
from ulysses_exp.report.units import of_seconds

_MOST = 40  # layouts on an axis; with more, no name could be read

_GRADES = (
    (COLOURS[0], "", "weights and optimizer bit-exact"),
    ("#9ecbe8", "", "weights bit-exact, no route restores the optimizer"),
    ("#f3c98b", "\\\\", "loads, not bit-exact"),
    ("#e8a07a", "///", "failed"),
)

Cells = dict[tuple[str, str], list[dict[str, Any]]]


def reload(runs: list[Run]) -> Drawn | None:
    """A cell for each pair of layouts that was tried."""
    cells: Cells = {}
    for run in runs:
        for cell in run.figure("reload.cells") or []:
            cells.setdefault((cell.get("source", "?"), cell.get("target", "?")), []).append(cell)
    if not cells:
        return None
    kept = [{name for name, _ in Counter(pair[i] for pair in cells).most_common(_MOST)} for i in (0, 1)]
    shown = {pair: found for pair, found in cells.items() if pair[0] in kept[0] and pair[1] in kept[1]}
    left_out = len(cells) - len(shown)
    return Drawn(_matrix(shown), f"{left_out:,} more pairs are not drawn." if left_out else "")


def _matrix(cells: Cells) -> Any:
    sources, targets = (sorted({pair[i] for pair in cells}, key=_layout_order) for i in (0, 1))
    wide, high = max(0.4, min(1.25, 9 / len(targets))), 0.62 if len(targets) <= 10 else 0.3
    canvas = figure(max(5.0, 2.2 + wide * len(targets)), 1.7 + high * len(sources))
    axes = canvas.add_subplot()
    for (source, target), found in cells.items():
        x, y = targets.index(target), sources.index(source)
        grade = _grade_of_pair(found)
        colour, hatch, _ = _GRADES[grade]
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=2)
        )
        if wide < 0.9:
            continue
        slowest: dict[str, float] = {}
        for cell in found:
            route = str(cell.get("route"))
            slowest[route] = max(cell.get("seconds") or 0, slowest.get(route, 0))
        text = "\n".join(f"{route} {of_seconds(seconds)}" for route, seconds in list(slowest.items())[:4])
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if grade == 0 else INK,
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.set_xlim(-0.5, len(targets) - 0.5)
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xticks(range(len(targets)), targets, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(sources)), sources)
    axes.set_xlabel("reloaded at")
    axes.set_ylabel("saved at")
    axes.set_facecolor("#f1f1f1")  # not tried
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    seen = sorted({_grade_of_pair(found) for found in cells.values()})
    handles = [
        Patch(facecolor=_GRADES[g][0], hatch=_GRADES[g][1], edgecolor="white", label=_GRADES[g][2]) for g in seen
    ]
    canvas.legend(handles=handles, loc="outside upper left", ncols=1 if len(targets) < 5 else 2, fontsize=8)
    return canvas


def _grade(cell: dict[str, Any]) -> int:
    """Index into `_GRADES`, the higher the worse."""
    if cell.get("weights_bit_exact") is False or cell.get("optimizer_bit_exact") is False:
        return 2
    if cell.get("status") != "ok":
        return 3
    return 0 if cell.get("optimizer_bit_exact") else 1


def _grade_of_pair(cells: list[dict[str, Any]]) -> int:
    """The worst that went wrong; where nothing did, the route that brings back most."""
    grades = [_grade(cell) for cell in cells]
    return max(grades) if max(grades) > 1 else min(grades)


def _layout_order(name: str) -> tuple[Any, ...]:
    try:
        layout = Layout.parse(name)
    except ValueError:
        return (1, name)
    return (0, layout)

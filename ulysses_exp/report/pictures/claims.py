"""What is said of Ulysses and what was measured: a picture for communication, one for memory, one for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

from ulysses_exp.layout import Layout
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import COLOURS, HATCHES, INK, figure
from ulysses_exp.report.units import of_bytes

_SIDES = ("upstream", "here")
_COMMUNICATION = ("C1", "C2", "C3", "C4", "C10")

#: Verdict: colour, hatch
_VERDICTS = {
    "holds": (COLOURS[0], ""),
    "holds if": ("#9ecbe8", ".."),
    "does not hold": ("#e8a07a", "///"),
    "not tried": ("#f1f1f1", ""),
}


def communication(runs: list[Run]) -> Drawn | None:
    """A row a claim and side, a column a layout."""
    run = _latest(runs, "C1")
    if run is None:
        return None
    rows = [(claim, side) for claim in _COMMUNICATION for side in _SIDES]
    layouts = _layouts(run, "C1")
    canvas = figure(max(4.8, 3.2 + 0.55 * len(layouts)), 1.9 + 0.28 * len(rows))  # the legend wants 4.8
    axes = canvas.add_subplot()
    for y, (claim, side) in enumerate(rows):
        for x, layout in enumerate(layouts):
            verdict = _cells(run, claim, side).get(layout.name, {}).get("verdict", "not tried")
            colour, hatch = _VERDICTS.get(verdict, _VERDICTS["not tried"])
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=1.5)
            )
    _grid(axes, [layout.name for layout in layouts], [f"{claim} {side}" for claim, side in rows])
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=verdict)
        for verdict, (colour, hatch) in _VERDICTS.items()
    ]
    canvas.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8)
    return Drawn(canvas, _about(runs, run))


def memory(runs: list[Run]) -> Drawn | None:
    """What the rank that holds most holds, by kind, a bar a layout and side."""
    run = _latest(runs, "C5")
    if run is None:
        return None
    bars = [
        (f"{layout.name} {side}", found)
        for layout in _layouts(run, "C5")
        for side in _SIDES
        if (found := _cells(run, "C5", side).get(layout.name, {}).get("bytes"))
    ]
    if not bars:
        return None
    kinds = list(bars[0][1])
    canvas = figure(9.5, 1.3 + 0.2 * len(bars))
    axes = canvas.add_subplot()
    lefts = [0.0] * len(bars)
    for index, kind in enumerate(kinds):
        sizes = [found.get(kind, 0) / 2**20 for _, found in bars]
        axes.barh(
            range(len(bars)), sizes, left=lefts, height=0.75, color=to_rgba(COLOURS[index % len(COLOURS)], 0.85),
            hatch=HATCHES[index % len(HATCHES)], edgecolor="white", label=kind,
        )  # fmt: skip
        lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
    for y, total in enumerate(lefts):
        axes.annotate(f" {of_bytes(total * 2**20)}", (total, y), va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(lefts) * 1.12)
    axes.set_xlabel("MiB on a rank")
    axes.grid(axis="y", visible=False)
    canvas.legend(loc="outside upper left", ncols=len(kinds), fontsize=8)
    return Drawn(canvas, _about(runs, run))


def opening(runs: list[Run]) -> Drawn | None:
    """Saved at by opened at, upstream beside here."""
    run = _latest(runs, "C7")
    if run is None:
        return None
    pairs = {
        side: {
            (source, target): bit_for_bit
            for source, cell in _cells(run, "C7", side).items()
            for target, bit_for_bit in (cell.get("opened") or {}).items()
        }
        for side in _SIDES
    }
    sources = _sorted({source for found in pairs.values() for source, _ in found})
    targets = _sorted({target for found in pairs.values() for _, target in found})
    if not sources:
        return None
    canvas = figure(2.6 + 2 * (0.24 * len(targets)), 2.1 + 0.24 * len(sources))
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, side in zip(panels, _SIDES, strict=True):
        for (source, target), bit_for_bit in pairs[side].items():
            colour, hatch = _VERDICTS["holds" if bit_for_bit else "does not hold"]
            corner = (targets.index(target) - 0.5, sources.index(source) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
        _grid(axes, targets, sources)
        axes.set_facecolor(_VERDICTS["not tried"][0])
        axes.set_title(side)
        axes.set_xlabel("opened at")
        axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    panels[0].set_ylabel("saved at")
    names = (("holds", "bit for bit"), ("does not hold", "not opened, or not bit for bit"), ("not tried", "not asked"))
    handles = [
        Patch(facecolor=_VERDICTS[verdict][0], hatch=_VERDICTS[verdict][1], edgecolor="white", label=label)
        for verdict, label in names
    ]
    canvas.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8)
    return Drawn(canvas, _about(runs, run))


def _latest(runs: list[Run], claim: str) -> Run | None:
    """The run of which a picture is drawn: claims are not put together."""
    known = [run for run in runs if _cells(run, claim, "upstream") or _cells(run, claim, "here")]
    return max(known, key=lambda run: run.results.get("started") or 0, default=None)


def _about(runs: list[Run], run: Run) -> str:
    others = sum(bool(r.figure("claims")) for r in runs) - 1
    return f"Of {run.model}." + (f" The newest of {others + 1} runs." if others else "")


def _cells(run: Run, claim: str, side: str) -> dict[str, Any]:
    return run.figure(f"claims.{claim}.{side}.cells") or {}


def _layouts(run: Run, claim: str) -> list[Layout]:
    names = {name for side in _SIDES for name in _cells(run, claim, side)}
    return sorted(Layout.parse(name) for name in names if _is_layout(name))


def _sorted(names: set[str]) -> list[str]:
    return [layout.name for layout in sorted(Layout.parse(name) for name in names if _is_layout(name))]


def _is_layout(name: str) -> bool:
    try:
        Layout.parse(name)
    except ValueError:
        return False
    return True


def _grid(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8, color=INK)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)

"""A row a run, or a group of runs: what each costs, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator

from ulysses_exp.report.groups import FEW, Group, rows
from ulysses_exp.report.pictures.axes import comparable, row_names, sp_of
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.pictures.spread import WORDS, spread, whisker
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import COLOURS, HATCHES, figure
from ulysses_exp.report.units import of_bytes, of_seconds

_GIB = 2**30
_KINDS, _OTHER = 8, "other"  # parts of a bar that have a name of their own


def costs(runs: list[Run]) -> Drawn | None:
    """Peak memory and step time side by side, a row a run, where neither sp nor the length is what differs."""
    keys = ("train.peak_memory_bytes.max", "train.step_time_s.median")
    measured = [run for run in comparable(runs) if all(run.figure(key) for key in keys)]
    if len(measured) < 2 or len({sp_of(run) for run in measured}) > 1 or len({run.seq_len for run in measured}) > 1:
        return None
    groups = rows(measured, lambda run: run.figure(keys[1]))
    canvas = figure(9.5, 1.1 + 0.34 * len(groups))
    panels = canvas.subplots(1, 2, sharey=True)
    kinds = (
        ("peak memory, worst rank (MiB)", 2**20, of_bytes),
        ("seconds per optimizer step, median", 1.0, of_seconds),
    )
    for index, (axes, key, (label, unit, text)) in enumerate(zip(panels, keys, kinds, strict=True)):
        spreads = [spread(run.figure(key) / unit for run in group.runs) for group in groups]
        sizes = [middle for _, middle, _ in spreads]
        places = range(len(groups))
        axes.barh(
            places, sizes, height=0.7, color=to_rgba(COLOURS[index], 0.85), hatch=HATCHES[index], edgecolor="white"
        )
        for row, (low, size, high) in enumerate(spreads):
            whisker(axes, row, low, high)
            axes.annotate(
                (" " if high == low else "  ") + text(size * unit), (max(size, high), row), va="center", fontsize=8
            )
        axes.set_xlim(0, max(high for *_, high in spreads) * 1.2)
        if len(measured) > FEW:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    row_names(panels[0], [group.label for group in groups])
    return Drawn(canvas, _note(measured, "thin line"))


def step_split(runs: list[Run]) -> Drawn | None:
    """Where the seconds of an optimizer step go."""
    split = [run for run in runs if run.figure("train.step_split_s")]
    groups = rows(split, lambda run: sum(run.figure("train.step_split_s").values()))
    parts = [(group.label, _median(group, "train.step_split_s")) for group in groups]
    return _stacked(parts, "seconds per optimizer step", of_seconds, 1.0, _note(split))


def plan(runs: list[Run]) -> Drawn | None:
    """Predicted peak memory of a rank by kind."""
    key = "plan.peak_memory_bytes_per_rank"
    planned = [run for run in runs if run.figure(key)]
    parts = []
    for group in rows(planned, lambda run: run.figure(f"{key}.total")):
        fits = sum(run.figure("plan.fits") is True for run in group.runs)
        verdict = "" if fits == len(group.runs) else " (does not fit)" if not fits else f" ({fits} fit)"
        sizes = {kind: size for kind, size in _median(group, key).items() if kind != "total"}
        parts.append((group.label + verdict, sizes))
    return _stacked(parts, "predicted peak memory per rank (GiB)", of_bytes, _GIB, _note(planned))


def _note(runs: list[Run], mark: str = "") -> str:
    if len(runs) <= FEW:
        return ""
    words = WORDS.format(mark=mark) if mark else "The median of each group"
    return f"{words}; how many runs it has is in brackets ({len(runs):,} runs)."


def _median(group: Group, key: str) -> dict[str, float]:
    """The median of each part of a figure that is a dictionary."""
    kinds = dict.fromkeys(kind for run in group.runs for kind in run.figure(key))
    return {kind: spread(run.figure(key).get(kind, 0.0) for run in group.runs)[1] for kind in kinds}


def _stacked(
    parts: list[tuple[str, dict[str, float]]], label: str, total: Callable[[float], str], unit: float, note: str
) -> Drawn | None:
    if not parts:
        return None
    canvas = figure(8.5, 1.3 + 0.34 * len(parts))
    axes = canvas.add_subplot()
    kinds = list(dict.fromkeys(kind for _, sizes in parts for kind in sizes))
    if len(kinds) > _KINDS:
        kinds = [*kinds[: _KINDS - 1], _OTHER]
        named = set(kinds)
        parts = [(name, sizes | {_OTHER: sum(n for kind, n in sizes.items() if kind not in named)})
                 for name, sizes in parts]  # fmt: skip
    ends = [0.0] * len(parts)
    for index, kind in enumerate(kinds):
        sizes = [of_row.get(kind, 0.0) / unit for _, of_row in parts]
        axes.barh(range(len(parts)), sizes, left=ends, height=0.7, color=to_rgba(COLOURS[index % len(COLOURS)], 0.85),
                  hatch=HATCHES[index % len(HATCHES)], edgecolor="white", label=kind)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for row, end in enumerate(ends):
        axes.annotate(" " + total(end * unit), (end, row), va="center", fontsize=8)
    axes.set_xlim(0, max(ends) * 1.14 or 1)
    row_names(axes, [name for name, _ in parts])
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    columns = max(2, 90 // (6 + max(map(len, kinds))))  # that fit beside each other
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(len(kinds), columns), borderaxespad=0.2)
    return Drawn(canvas, note)

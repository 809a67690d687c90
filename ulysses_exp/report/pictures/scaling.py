"""A figure against sequence length or sp: throughput, peak memory, the longest sequence that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ulysses_exp.report.groups import FEW, Group, axis_of, explaining
from ulysses_exp.report.pictures.axes import comparable, sp_of
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.pictures.spread import WORDS, band, spread
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import FAINT, figure, powers_of_two, series
from ulysses_exp.report.traits import differing

_GIB = 2**30
_BY_SP = "sequence-parallel ranks (sp)"
_PANELS = 6


def throughput(runs: list[Run]) -> Drawn | None:
    """Tokens per second against sequence length, a line for each sp; against sp where there is one length only."""
    measured = [run for run in comparable(runs) if run.layout and run.seq_len and run.figure("train.tokens_per_second")]
    if len({run.seq_len for run in measured}) > 1:
        axis, line, label = _length, "sp", "sequence length (tokens)"
    elif len({sp_of(run) for run in measured}) > 1:
        axis, line, label = sp_of, "zero", _BY_SP
    else:
        return None
    canvas, panels, note = _panels(measured, axis, line, lambda run: run.figure("train.tokens_per_second"), label)
    panels[0].set_ylabel("tokens per second, all ranks")
    largest = panels[0].get_ylim()[1]
    unit, name = (1e6, " M") if largest > 3e6 else (1e3, " k") if largest > 1e4 else (1, "")
    for axes in panels:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}{name if value else ''}"))
        axes.legend(loc="best")
    return Drawn(canvas, note)


def memory(runs: list[Run]) -> Drawn | None:
    """Peak memory of the worst rank against sp, beside the ideal: the smallest sp's divided by sp."""
    measured = [
        run for run in comparable(runs) if run.layout and run.seq_len and run.figure("train.peak_memory_bytes.max")
    ]
    if len({sp_of(run) for run in measured}) < 2:
        return None
    line = "seq_len" if len({run.seq_len for run in measured}) > 1 else "zero"
    canvas, panels, note = _panels(
        measured, sp_of, line, lambda run: run.figure("train.peak_memory_bytes.max") / _GIB, _BY_SP
    )
    panels[0].set_ylabel("peak memory, worst rank (GiB)")
    _ideal(panels, lambda sps, peaks: peaks[0] * sps[0] / sps, "ideal: 1/sp")
    return Drawn(canvas, note)


def longest(runs: list[Run]) -> Drawn | None:
    """The longest sequence that trains against sp, beside the ideal: the smallest sp's times sp."""
    measured = [run for run in runs if run.layout and run.figure("train.max_seq_len")]
    if len({sp_of(run) for run in measured}) < 2:
        return None
    canvas, panels, note = _panels(
        measured, sp_of, "zero", lambda run: run.figure("train.max_seq_len"), _BY_SP, {"seq_len"}
    )
    panels[0].set_ylabel("longest sequence that trains (tokens)")
    _ideal(panels, lambda sps, tokens: tokens[0] * sps / sps[0], "ideal: in proportion to sp")
    top = 1.05 * max(float(np.max(line.get_ydata())) for axes in panels for line in axes.get_lines())
    for axes in panels:
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return Drawn(canvas, note)


def _length(run: Run) -> int:
    return run.seq_len or 0


def _ideal(panels: list[Axes], ideal: Callable[[np.ndarray, np.ndarray], np.ndarray], name: str) -> None:
    """A dotted line beside each line: what `ideal` makes of its sp and values."""
    dots: dict[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.0}
    for axes in panels:
        for drawn in axes.get_lines():
            sps, values = (np.asarray(data, dtype=float) for data in drawn.get_data())
            axes.plot(sps, ideal(sps, values), color=drawn.get_color(), label="_ideal", **dots)
        handles, names = axes.get_legend_handles_labels()
        axes.legend([*handles, Line2D([], [], color=FAINT, **dots)], [*names, name], loc="best")


def _panels(
    runs: list[Run],
    axis: Callable[[Run], int],
    line: str,
    value: Callable[[Run], float],
    label: str,
    besides: Iterable[str] = (),
) -> tuple[Figure, list[Axes], str]:
    """Lines of `value` against `axis`, one for each value of trait `line`; a panel for each difference not `besides`.

    Few runs: panels without a line (one point each) are left out where others have one, and those beyond six. Many
    runs: a panel for each value of the setting that explains most of `value`, and the median of the runs at a point.

    Returns:
        The figure, its panels, and a note on what it does not show.
    """
    on_axes = {line, "sp" if axis is sp_of else "seq_len", *besides}
    note = ""
    if len(runs) <= FEW:
        names = [name for name in differing(runs) if name not in on_axes]
        parts: dict[str, list[Run]] = {}
        for run in runs:
            parts.setdefault(", ".join(run.traits.get(name, "?") for name in names), []).append(run)
        groups = [Group(title, members) for title, members in parts.items()]
        reach = {group.label: max(map(len, _points(group.runs, axis, line).values())) for group in groups}
        groups = [group for group in groups if reach[group.label] > 1 or max(reach.values()) == 1]
        if len(groups) > _PANELS:
            left_out = sum(len(group.runs) for group in groups[_PANELS:])
            note = f"{left_out:,} more {'runs' if left_out > 1 else 'run'} in the table."
        groups = groups[:_PANELS]
    else:
        axes_ = [found for found in explaining(runs, value, _PANELS, tuple(on_axes)) if len(found.values) > 1]
        groups = axes_[0].split(runs) if axes_ else [Group("", runs)]
        note = f"{WORDS.format(mark='band')} ({len(runs):,} runs)."
    return *_draw(groups, runs, axis, line, value, label), note


def _points(runs: list[Run], axis: Callable[[Run], int], line: str) -> dict[str, dict[int, list[Run]]]:
    """The runs at each point of each line."""
    along = axis_of(runs, line, len(runs) if len(runs) <= FEW else 7)
    found: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        name = along.of(run) if along is not None else "all"
        found.setdefault(name, {}).setdefault(axis(run), []).append(run)
    return found


def _draw(
    groups: list[Group],
    runs: list[Run],
    axis: Callable[[Run], int],
    line: str,
    value: Callable[[Run], float],
    label: str,
) -> tuple[Figure, list[Axes]]:
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    canvas = figure(1.6 + 3.2 * columns if columns > 1 else 5.6, 0.4 + 3.2 * rows)
    many = len(runs) > FEW
    order = axis_of(runs, line, 7) if many else None
    panels, top = [], 0.0
    for number, group in enumerate(groups):
        axes = canvas.add_subplot(rows, columns, number + 1)
        points = _points(group.runs, axis, line)
        for index, name in enumerate(points):
            style = series(order.values.index(name) if order is not None and name in order.values else index)
            xs = sorted(points[name])
            if many:
                spreads = [spread(value(run) for run in points[name][x]) for x in xs]
                band(axes, xs, spreads, label=name, **style)
                top = max(top, *(high for *_, high in spreads))
            else:
                ys = [max(value(run) for run in points[name][x]) for x in xs]
                axes.plot(xs, ys, label=name, **style)
                top = max(top, *ys)
        powers_of_two(axes, [x for of_line in points.values() for x in of_line], label)
        axes.set_title(group.label)
        panels.append(axes)
    for axes in panels:
        axes.set_ylim(0, 1.08 * top)
    return canvas, panels

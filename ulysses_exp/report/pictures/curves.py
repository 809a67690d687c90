"""Loss curves: one line whatever the layout, and what settings make of it where there are many runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ulysses_exp.report.groups import FEW, Axis, Group, explaining
from ulysses_exp.report.pictures.axes import ZERO_AT, comparable, difference_axis
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.pictures.spread import WORDS, band, spread
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import INK, figure, series
from ulysses_exp.report.traits import LAYOUT, differing, labels

_POINTS = 400  # of a curve as many are drawn
_STEPS = 120  # of a band


def loss(runs: list[Run]) -> Drawn | None:
    """Loss curves of runs that must have the same one, and how far each is from the first."""
    trained = [run for run in comparable(runs) if run.losses]
    if not trained:
        return None
    of_experiment: dict[str, list[Run]] = {}
    for run in trained:
        of_experiment.setdefault(run.experiment, []).append(run)
    if len(trained) > FEW:
        return _bands(trained, list(of_experiment.values()))
    largest = sorted(of_experiment.values(), key=len, reverse=True)[:3]
    left_out = len(trained) - sum(map(len, largest))
    drawn = _lines(sorted(largest, key=lambda group: group[0].seq_len or 0))
    return Drawn(drawn, f"{left_out} more in the table." if left_out else "")


def _lines(groups: list[list[Run]]) -> Figure:
    compared = any(len(group) > 1 for group in groups)
    canvas = figure(7.5 if len(groups) == 1 else 11, 5.2 if compared else 3.4)
    grid = canvas.add_gridspec(2 if compared else 1, len(groups), height_ratios=[3, 2] if compared else [1])
    for column, group in enumerate(groups):
        group.sort(key=lambda run: (-len(run.losses), run.layout.world if run.layout else 0))
        names = labels(group)
        upper = canvas.add_subplot(grid[0, column])
        for index, (label, run) in enumerate(zip(names, group, strict=True)):
            style = series(index) | {
                "marker": "",
                "linewidth": max(min(6.0, 1.8 + 1.1 * (len(group) - 1)) - 1.1 * index, 1.2),
            }
            _curve(upper, run, label, style)
        upper.set_ylabel("training loss (nats per token)" if column == 0 else "")
        if len(groups) == 1:
            upper.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=1 + len(group) // 17)
        else:
            handles, _ = upper.get_legend_handles_labels()
            upper.legend(loc="best", handles=handles[:8], title="" if len(group) <= 8 else f"8 of {len(group)}")
        upper.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(groups) > 1:
            shared_traits = differing([members[0] for members in groups])
            upper.set_title(", ".join(group[0].traits.get(name, "?") for name in shared_traits if name not in LAYOUT))
        if not compared:
            upper.set_xlabel("optimizer step")
            continue
        lower = canvas.add_subplot(grid[1, column], sharex=upper)
        reference = group[0]
        for index, run in enumerate(group[1:], 1):
            shared = [step for step in run.losses if step in reference.losses]
            differences = [_relative(run.losses[step], reference.losses[step]) for step in shared]
            lower.plot(*thinned(shared, differences), **(series(index) | {"markersize": 3.5}))
        difference_axis(lower, "y", 1e-6)
        lower.set_ylabel("relative difference\nto the first"
                         if column == 0 else "")  # fmt: skip
        lower.set_xlabel("optimizer step")
    return canvas


def _curve(axes: Axes, run: Run, label: str, style: dict[str, Any]) -> None:
    """A run's losses; a cross where they stop being finite."""
    if run.diverged:
        label += f", not finite from step {run.diverged[0]:,}"
    axes.plot(*thinned(list(run.losses), list(run.losses.values())), label=label, **style)
    before = [step for step in run.losses if run.diverged and step < run.diverged[0]]
    if before:
        axes.plot(
            before[-1:], [run.losses[before[-1]]], color=style["color"], marker="x", markersize=8, markeredgewidth=2
        )


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most about 400 points of a curve: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(steps) <= _POINTS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), _POINTS // 2):
        known = [int(i) for i in part if not math.isnan(values[i])]
        kept |= {min(known, key=lambda i: values[i]), max(known, key=lambda i: values[i])} if known else {int(part[0])}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference) / max(abs(reference), 1e-30)
    return max(difference, ZERO_AT) if not math.isnan(difference) else difference


def _bands(runs: list[Run], experiments: list[list[Run]]) -> Drawn:
    """A band for each value of the setting that explains most of the last loss, a panel for each of the next one.

    Below, for experiments of several layouts: how far the layouts of an experiment are from each other.
    """
    found = explaining(runs, lambda run: run.last_loss, most=6, besides=LAYOUT)
    lines = found[0] if found else None
    panel = found[1] if len(found) > 1 else None
    panels = panel.split(runs) if panel is not None else [Group("", runs)]
    several = [group for group in experiments if len(group) > 1]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas = figure(7.5 if columns == 1 else 11, 3.0 * rows + (2.3 if several else 0) + 0.4)
    grid = canvas.add_gridspec(rows + bool(several), columns, height_ratios=[3.0] * rows + [2.1] * bool(several))
    best = min((run for run in runs if run.last_loss is not None), key=lambda run: run.last_loss or 0.0, default=None)
    ends: list[float] = []
    for number, part in enumerate(panels):
        axes = canvas.add_subplot(grid[number // columns, number % columns])
        ends += _panel(axes, part.runs, lines, best)
        if panel is not None:
            axes.set_title(part.label)
        axes.set_ylabel("training loss (nats per token)" if number % columns == 0 else "")
        axes.set_xlabel("optimizer step" if number + columns >= len(panels) else "")
    known = [end for end in ends if math.isfinite(end)]
    for axes in canvas.axes:
        if known and max(known) > min(known):
            margin = 0.05 * (max(known) - min(known))
            axes.set_ylim(min(known) - margin, max(known) + margin)
    handles, names = canvas.axes[0].get_legend_handles_labels()
    for axes in canvas.axes[1:]:  # a value, or the best run, may be in another panel
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    canvas.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)))
    if several:
        _agreement(canvas.add_subplot(grid[rows, :]), several)
    diverged = sum(bool(run.diverged) for run in runs)
    note = f"{WORDS.format(mark='band')} ({len(runs):,} runs)."
    if diverged:
        note += f" {diverged:,} {'runs are' if diverged > 1 else 'run is'} not finite from some step on and end there."
    return Drawn(canvas, note)


def _panel(axes: Axes, runs: list[Run], lines: Axis | None, best: Run | None) -> list[float]:
    """Bands of `runs`; returns the ends that the axis has to hold."""
    ends: list[float] = []
    for index, value in enumerate(lines.values if lines is not None else [""]):
        members = [run for run in runs if lines is None or lines.of(run) == value]
        if not members:
            continue
        longest = max(members, key=lambda run: len(run.losses))
        steps = _some(list(longest.losses))
        spreads = [spread(run.losses.get(step) for run in members) for step in steps]
        band(axes, steps, spreads, label=value or "all", **(series(index) | {"marker": ""}))
        ends += [end for low_middle_high in spreads for end in low_middle_high]
    if best is not None and any(run is best for run in runs):
        axes.plot(
            *thinned(list(best.losses), list(best.losses.values())), color=INK, linewidth=1.1,
            label=f"best run: {best.last_loss:.4f}",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ends


def _some(steps: list[int]) -> list[int]:
    """At most `_STEPS` of `steps`, evenly, first and last among them."""
    where = np.unique(np.linspace(0, len(steps) - 1, min(_STEPS, len(steps))).round().astype(int))
    return [steps[i] for i in where]


def _agreement(axes: Axes, experiments: list[list[Run]]) -> None:
    """At each step the largest difference between layouts of one experiment: the median and the worst of all."""
    longest = max((run for group in experiments for run in group), key=lambda run: len(run.losses))
    steps = _some(list(longest.losses))
    worst = np.full((len(experiments), len(steps)), np.nan)
    for row, group in enumerate(experiments):
        reference = max(group, key=lambda run: len(run.losses))
        for run in group:
            if run is reference:
                continue
            for column, step in enumerate(steps):
                if step in run.losses and step in reference.losses:
                    found = _relative(run.losses[step], reference.losses[step])
                    worst[row, column] = np.fmax(worst[row, column], found)
    for index, (name, share) in enumerate((("median", 50), (f"worst of {len(experiments):,} settings", 100))):
        values = [np.percentile(known, share) if len(known := part[np.isfinite(part)]) else np.nan for part in worst.T]
        axes.plot(steps, values, label=name, **(series(index) | {"markersize": 3.5}))
    difference_axis(axes, "y", 1e-6)
    axes.set_ylabel("relative difference\nbetween layouts")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)

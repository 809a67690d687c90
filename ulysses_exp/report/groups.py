"""Runs put together for pictures that cannot show each of a thousand.

The settings that explain most of a figure tell the groups apart; what else differs is a group's spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ulysses_exp.report.runs import Run
from ulysses_exp.report.traits import LAYOUT, differing, heading, labels

#: As many runs are shown one by one
FEW = 24
_WHOLE = "layout"  # sp, dp and ZeRO as one setting
_MATTERS = 0.05  # the least share of a figure's variance by which a setting tells groups apart
_RANGES = 5  # into which a number with many values is cut


@dataclass(frozen=True)
class Group:
    """Runs that stand in one row or one line, in the order of the report."""

    label: str
    runs: list[Run]


@dataclass(frozen=True)
class Axis:
    """A setting in which runs differ, with few values or few ranges of them, in order."""

    trait: str
    title: str
    values: list[str]
    _of_run: dict[int, str]
    explains: float = 0.0  # the share of the variance of a figure's ranks, where it was asked for

    def of(self, run: Run) -> str:
        """The value, or range of values, that holds `run`."""
        return self._of_run[id(run)]

    def split(self, runs: list[Run]) -> list[Group]:
        """`runs` by value; values without a run are left out."""
        found: dict[str, list[Run]] = {value: [] for value in self.values}
        for run in runs:
            found[self.of(run)].append(run)
        return [Group(value, members) for value, members in found.items() if members]


def rows(runs: list[Run], value: Callable[[Run], float | None]) -> list[Group]:
    """A group a run where they are few, else at most `FEW` groups, told apart by what explains most of `value`."""
    if len(runs) <= FEW:
        return [Group(label, [run]) for label, run in zip(labels(runs), runs, strict=True)]
    groups = [Group("", runs)]
    axes = explaining(runs, value, besides=LAYOUT, layouts=True)
    if all(axis.trait != _WHOLE for axis in axes) and (layouts := axis_of(runs, _WHOLE, FEW)) is not None:
        axes.append(layouts)
    for axis in axes:
        finer = [
            Group(f"{group.label}, {part.label}".removeprefix(", "), part.runs)
            for group in groups
            for part in axis.split(group.runs)
        ]
        if len(finer) <= FEW:
            groups = finer
    return [Group(f"{group.label or 'all'} ({len(group.runs)})", group.runs) for group in groups]


def explaining(
    runs: list[Run],
    value: Callable[[Run], float | None],
    most: int = FEW,
    besides: tuple[str, ...] = (),
    layouts: bool = False,
) -> list[Axis]:
    """The settings in which `runs` differ, first what explains most of `value`; those that explain next to nothing
    are left out.

    Args:
        most: values that an axis may have; numbers with more are cut into ranges, texts with more are left out.
        besides: traits that are not asked for.
        layouts: whether the layout as a whole is one of the settings.
    """
    figures = np.array([math.nan if (figure := value(run)) is None else figure for run in runs], dtype=float)
    known = np.isfinite(figures)
    ranks = np.argsort(np.argsort(figures[known], kind="stable"), kind="stable").astype(float)
    found = []
    for trait in (*([_WHOLE] if layouts else []), *differing(runs)):
        if trait in besides:
            continue
        axis = axis_of(runs, trait, most)
        if axis is None:
            continue
        where = np.array([axis.values.index(axis.of(run)) for run in runs])[known]
        explained = _explained(where, ranks)
        if explained > _MATTERS:
            found.append(replace(axis, explains=explained))
    return sorted(found, key=lambda axis: (-axis.explains, len(axis.values), axis.trait))


def axis_of(runs: list[Run], trait: str, most: int) -> Axis | None:
    """The values of `trait` over `runs`, in order; None where they are many and no numbers."""
    if trait == _WHOLE:
        known_layouts = sorted({run.layout for run in runs if run.layout is not None})
        names = [layout.name for layout in known_layouts] + ["?"] * any(run.layout is None for run in runs)
        if len(names) > most:
            return None
        return Axis(trait, trait, names, {id(run): run.layout.name if run.layout else "?" for run in runs})
    of_run = {id(run): run.traits.get(trait, "?") for run in runs}
    values = list(dict.fromkeys(of_run.values()))
    numbers = {text: _number(text, trait) for text in values}
    known = sorted({number for number in numbers.values() if number is not None})
    if len(known) == len(values):
        values.sort(key=lambda text: numbers[text] or 0.0)
    if len(values) > most:
        if len(known) < len(values):
            return None
        parts = [part for part in np.array_split(np.array(known), min(_RANGES, most)) if len(part)]
        if trait == "seq_len":
            names = [f"{part[0]:,.0f} to {part[-1]:,.0f} tokens" for part in parts]
        else:
            names = [f"{heading(trait)} {part[0]:.3g} to {part[-1]:.3g}" for part in parts]
            if len(set(names)) < len(names):
                names = [f"{heading(trait)} {part[0]} to {part[-1]}" for part in parts]
        range_of = {number: name for part, name in zip(parts, names, strict=True) for number in part.tolist()}
        return Axis(trait, heading(trait), names, {run: range_of[numbers[text] or 0.0] for run, text in of_run.items()})
    return Axis(trait, heading(trait), values, of_run)


def _number(text: str, trait: str) -> float | None:
    """The number in `lr 0.001`, `ZeRO 3` or `4,096 tokens`; None where there is more than that."""
    bare = text.removesuffix(" tokens").replace(",", "") if trait == "seq_len" else text.rpartition(" ")[2]
    try:
        number = float(bare) if trait == "seq_len" or text == f"{heading(trait)} {bare}" else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _explained(where: np.ndarray, ranks: np.ndarray) -> float:
    """The share of the variance of `ranks` that lies between groups, corrected for their number (epsilon squared)."""
    if len(ranks) < 2:
        return 0.0
    sizes = np.bincount(where)
    sums = np.bincount(where, weights=ranks)
    filled = sizes > 0
    whole = float(((ranks - ranks.mean()) ** 2).sum())
    between = float((sizes[filled] * (sums[filled] / sizes[filled] - ranks.mean()) ** 2).sum())
    groups, count = int(filled.sum()), len(ranks)
    if groups < 2 or whole == 0 or count <= groups:
        return 0.0
    return (between - (groups - 1) * (whole - between) / (count - groups)) / whole

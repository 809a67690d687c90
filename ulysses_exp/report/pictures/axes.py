"""Axes that several pictures share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes

from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import FAINT

ZERO_AT = 1e-17  # where a difference of exactly zero is drawn on a logarithmic axis


def comparable(runs: list[Run]) -> list[Run]:
    """Runs at a length that was asked for; those that searched the longest have each their own."""
    return [run for run in runs if not run.figure("train.max_seq_len")]


def sp_of(run: Run) -> int:
    """Ranks of a sequence-parallel group, 0 where the layout is not known."""
    return run.layout.sp if run.layout else 0


def row_names(axes: Axes, names: Iterable[str]) -> None:
    """A name beside each row, the first at the top; long ones in two lines."""
    listed = ["\n".join(textwrap.wrap(name, 52)) for name in names]
    axes.set_yticks(range(len(listed)), listed)
    axes.invert_yaxis()


def difference_axis(axes: Axes, which: str, allowed: float, others: dict[str, float] | None = None) -> None:
    """A logarithmic axis for differences, with a place for exactly zero and a line at what is allowed.

    Args:
        others: what has a limit of its own, by name.
    """
    largest = max(allowed, *(others or {}).values(), 0.0)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(ZERO_AT / 3, max(largest * 10, getattr(axes, f"get_{which}lim")()[1]))
    ticks = [ZERO_AT, *(10.0**e for e in range(-15, math.ceil(math.log10(largest)) + 2, 3))]
    axis: Any = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks, labels=["0", *(f"1e{round(math.log10(t))}" for t in ticks[1:])])
    axis.set_ticks([], minor=True)
    for name, limit in {"": allowed, **(others or {})}.items():
        _limit(axes, which, limit, name)


def _limit(axes: Axes, which: str, allowed: float, of: str) -> None:
    text = f"{of} allowed {allowed:.0e}".replace("e-0", "e-").strip()
    dashes = (0, (1, 2)) if of else (0, (4, 3))
    if which == "x":  # into the legend: beside the line it would lie over the markers
        axes.axvline(allowed, color=FAINT, linewidth=0.9, linestyle=dashes, label=text)
        return
    axes.axhline(allowed, color=FAINT, linewidth=0.9, linestyle=dashes)
    axes.annotate(
        text, (1, allowed), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=FAINT
    )

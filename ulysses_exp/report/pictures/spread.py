"""Many runs as one mark: the median, and where eight in ten of them lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ulysses_exp.report.style import INK

WORDS = "The median of each group; eight in ten of its runs lie in the {mark}"


def spread(values: Iterable[float | None]) -> tuple[float, float, float]:
    """The 10th percentile, the median and the 90th percentile of what is known; NaN of nothing."""
    known = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)
    if not len(known):
        return math.nan, math.nan, math.nan
    low, middle, high = np.percentile(known, [10, 50, 90])
    return float(low), float(middle), float(high)


def band(axes: Axes, xs: Sequence[float], spreads: Sequence[tuple[float, float, float]], **style: Any) -> None:
    """A line through the medians, and a band behind it."""
    low, middle, high = (list(part) for part in zip(*spreads, strict=True))
    axes.plot(xs, middle, **style)
    axes.fill_between(xs, low, high, color=style["color"], alpha=0.16, linewidth=0)


def whisker(axes: Axes, row: float, low: float, high: float) -> None:
    """A thin line across a bar, where the bar stands for several runs."""
    if high > low:
        axes.plot([low, high], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt", marker="|", markersize=5)

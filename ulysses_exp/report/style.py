"""How the pictures look: readable by colour-blind people, in print and in grey."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

#: Okabe and Ito's palette, distinguishable with any colour vision; yellow is left out, it vanishes on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++")
INK, FAINT, GRID = "#222222", "#767676", "#d8d8d8"

RC: Any = {  # matplotlib's stubs want its keys as literals
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],  # all but the first: browsers without it
    "text.parse_math": False,  # names may have dollars in them
    "svg.fonttype": "none",  # text that can be searched, at a third of the size
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "ulysses-exp",  # the same results give the same file
    "figure.facecolor": "white",
}


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches; not one of pyplot's, so nothing is kept and no display is looked for."""
    return Figure(figsize=(width, height), layout="constrained")


def series(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the `index`-th line: each alone tells the lines apart."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[(index + index // len(COLOURS)) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def powers_of_two(axes: Axes, values: list[int], label: str) -> None:
    """A logarithmic x axis with a tick at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    spread = math.sqrt(2)
    axes.set_xlim(min(values) / spread, max(values) * spread)
    axes.set_xlabel(label)

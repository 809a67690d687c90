"""The longest planned sequence of each layout."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter

from ulysses_exp.report.groups import FEW
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import COLOURS, FAINT, HATCHES, INK, figure

_CHOICES = 6  # of memory savers as many have a bar


def plan_grid(runs: list[Run]) -> Drawn | None:
    """The longest planned sequence of each layout, a bar for each choice of memory savers."""
    planned = [run for run in runs if run.layout and run.figure("plan.max_seq_len") is not None]
    lengths: dict[tuple[Any, str], int] = {}
    for run in planned:
        key = (run.layout, _memory(run))
        lengths[key] = max(run.figure("plan.max_seq_len"), lengths.get(key, 0))
    longest_of = {name: max(n for (_, choice), n in lengths.items() if choice == name) for _, name in lengths}
    choices = sorted(longest_of, key=lambda name: longest_of[name])[-_CHOICES:]
    reach = {layout: max(n for (other, _), n in lengths.items() if other == layout) for layout, _ in lengths}
    kept = sorted(reach, key=lambda layout: -reach[layout])[:FEW]
    layouts = sorted(kept, key=lambda layout: (layout.zero, layout))
    if len(layouts) < 2:
        return None
    least = 2 ** (min((n for n in lengths.values() if n), default=1024).bit_length() - 2)
    height = 0.8 / len(choices)
    canvas = figure(7.5, 1.4 + len(layouts) * (0.14 + 0.14 * len(choices)))
    axes = canvas.add_subplot()
    for index, choice in enumerate(choices):
        found = [(y, lengths[layout, choice]) for y, layout in enumerate(layouts) if (layout, choice) in lengths]
        rows = [y + (index - (len(choices) - 1) / 2) * height for y, _ in found]
        widths = [max(length - least, 0) for _, length in found]
        look: Any = {"color": COLOURS[index % len(COLOURS)], "hatch": HATCHES[index % len(HATCHES)]}
        axes.barh(rows, widths, height * 0.9, left=least, edgecolor="white", label=choice, **look)
        for y, (_, length) in zip(rows, found, strict=True):
            text = f" {length:,}" if length else " fits no length"
            axes.text(max(length, least), y, text, va="center", fontsize=6.5, color=INK if length else FAINT)
    axes.set_xscale("log", base=2)
    axes.set_xlim(least, max(*longest_of.values(), least) * 4)
    axes.xaxis.set_major_formatter(FuncFormatter(_binary))
    axes.set_xlabel(f"longest sequence that fits (tokens), {planned[0].model}, {planned[0].figure('plan.hardware')}")
    axes.set_yticks(range(len(layouts)), [layout.name for layout in layouts])
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    canvas.legend(loc="outside upper left", ncols=len(choices), title="memory", alignment="left")
    left_out = len(reach) - len(layouts)
    return Drawn(canvas, f"{left_out:,} more layouts in the table." if left_out else "")


def _memory(run: Run) -> str:
    """The choice of memory savers."""
    return run.traits.get("memory.name", "memory none").removeprefix("memory ")


def _binary(value: float, _: Any) -> str:
    """A power of two as sequence lengths are called: 128 K are 131,072."""
    return f"{value / 2**20:g} M" if value >= 2**20 else f"{value / 2**10:g} K" if value >= 2**10 else f"{value:g}"

"""The report's pictures, each drawn only where the runs have data for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ulysses_exp.layout import Layout
from ulysses_exp.report.runs import Run, differing, labels, traits
from ulysses_exp.report.style import COLOURS, FAINT, HATCHES, INK, RC, figure, powers_of_two, series
from ulysses_exp.report.units import of_bytes, of_count, of_seconds

GIB = 2**30
ZERO_AT = 1e-17  # where a difference of exactly zero is drawn on a logarithmic axis


@dataclass(frozen=True)
class Picture:
    """A drawn figure with the sentence that says what to see in it."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(runs: list[Run]) -> list[Picture]:
    """Every picture that `runs` have data for."""
    drawn = []
    with matplotlib.rc_context(RC):
        for name, title, caption, painter in _PICTURES:
            picture = painter(runs)
            if picture is not None:
                drawn.append(Picture(name, title, caption, picture))
    return drawn


def names() -> list[str]:
    """The names that pictures can have, in the order of the report."""
    return [name for name, *_ in _PICTURES]


def throughput(runs: list[Run]) -> Figure | None:
    """Tokens per second against sequence length, a line for each sp; against sp where there is one length only."""
    measured = [
        run for run in _comparable(runs) if run.layout and run.seq_len and run.figure("train.tokens_per_second")
    ]
    if len({run.seq_len for run in measured}) > 1:
        axis, line, label = _length, "sp", "sequence length (tokens)"
    elif len({_sp(run) for run in measured}) > 1:
        axis, line, label = _sp, "zero", "sequence-parallel ranks (sp)"
    else:
        return None
    canvas, panels = _panels(measured, axis, line, lambda run: run.figure("train.tokens_per_second"), label)
    panels[0].set_ylabel("tokens per second, all ranks")
    largest = panels[0].get_ylim()[1]
    unit, name = (1e6, " M") if largest > 3e6 else (1e3, " k") if largest > 1e4 else (1, "")
    for axes in panels:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}{name if value else ''}"))
        axes.legend(loc="best")
    return canvas


def memory(runs: list[Run]) -> Figure | None:
    """Peak memory of the worst rank against sp, beside the ideal: the smallest sp's divided by sp."""
    measured = [
        run for run in _comparable(runs) if run.layout and run.seq_len and run.figure("train.peak_memory_bytes.max")
    ]
    if len({_sp(run) for run in measured}) < 2:
        return None
    line = "seq_len" if len({run.seq_len for run in measured}) > 1 else "zero"
    canvas, panels = _panels(
        measured, _sp, line, lambda run: run.figure("train.peak_memory_bytes.max") / GIB, "sequence-parallel ranks (sp)"
    )
    panels[0].set_ylabel("peak memory, worst rank (GiB)")
    _ideal(panels, lambda sps, peaks: peaks[0] * sps[0] / sps, "ideal: 1/sp")
    return canvas


def costs(runs: list[Run]) -> Figure | None:
    """Peak memory and step time side by side, a row a run, where neither sp nor the length is what differs."""
    keys = ("train.peak_memory_bytes.max", "train.step_time_s.median")
    measured = [run for run in _comparable(runs) if all(run.figure(key) for key in keys)]
    if len(measured) < 2 or len({_sp(run) for run in measured}) > 1 or len({run.seq_len for run in measured}) > 1:
        return None
    canvas = figure(9.5, 1.1 + 0.34 * len(measured))
    panels = canvas.subplots(1, 2, sharey=True)
    rows = range(len(measured))
    kinds = (
        ("peak memory, worst rank (MiB)", 2**20, of_bytes),
        ("seconds per optimizer step, median", 1.0, of_seconds),
    )
    for index, (axes, key, (label, unit, text)) in enumerate(zip(panels, keys, kinds, strict=True)):
        sizes = [run.figure(key) / unit for run in measured]
        axes.barh(rows, sizes, height=0.7, color=to_rgba(COLOURS[index], 0.85), hatch=HATCHES[index], edgecolor="white")
        for row, size in zip(rows, sizes, strict=True):
            axes.annotate(" " + text(size * unit), (size, row), va="center", fontsize=8)
        axes.set_xlim(0, max(sizes) * 1.2)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(list(rows), labels(measured))
    panels[0].invert_yaxis()
    return canvas


def longest(runs: list[Run]) -> Figure | None:
    """The longest sequence that trains against sp, beside the ideal: the smallest sp's times sp."""
    measured = [run for run in runs if run.layout and run.figure("train.max_seq_len")]
    if len({_sp(run) for run in measured}) < 2:
        return None
    canvas, panels = _panels(
        measured, _sp, "zero", lambda run: run.figure("train.max_seq_len"), "sequence-parallel ranks (sp)", {"seq_len"}
    )
    panels[0].set_ylabel("longest sequence that trains (tokens)")
    _ideal(panels, lambda sps, tokens: tokens[0] * sps / sps[0], "ideal: in proportion to sp")
    top = 1.05 * max(float(np.max(line.get_ydata())) for axes in panels for line in axes.get_lines())
    for axes in panels:
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return canvas


def loss(runs: list[Run]) -> Figure | None:
    """Loss curves of runs that must have the same one, and how far each is from the first."""
    trained: dict[str, list[Run]] = {}
    for run in _comparable(runs):
        if run.losses:
            trained.setdefault(run.experiment, []).append(run)
    largest = sorted(trained.values(), key=len, reverse=True)[:3]
    groups = sorted(largest, key=lambda group: group[0].seq_len or 0)
    if not groups:
        return None
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
            upper.plot(list(run.losses), list(run.losses.values()), label=label, **style)
        upper.set_ylabel("training loss (nats per token)" if column == 0 else "")
        if len(groups) == 1:
            upper.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=1 + len(group) // 17)
        else:
            upper.legend(
                loc="best", handles=upper.get_lines()[:8], title="" if len(group) <= 8 else f"8 of {len(group)}"
            )
        upper.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(groups) > 1:
            shared_traits = differing([members[0] for members in groups])
            upper.set_title(
                ", ".join(traits(group[0]).get(name, "?") for name in shared_traits if name not in ("sp", "dp", "zero"))
            )
        if not compared:
            upper.set_xlabel("optimizer step")
            continue
        lower = canvas.add_subplot(grid[1, column], sharex=upper)
        reference = group[0]
        for index, run in enumerate(group[1:], 1):
            shared = [step for step in run.losses if step in reference.losses]
            differences = [abs(run.losses[s] - reference.losses[s]) / abs(reference.losses[s]) for s in shared]
            lower.plot(shared, [max(d, ZERO_AT) for d in differences], **(series(index) | {"markersize": 3.5}))
        _difference_axis(lower, "y", 1e-6)
        lower.set_ylabel("relative difference\nto the first"
                         if column == 0 else "")  # fmt: skip
        lower.set_xlabel("optimizer step")
    return canvas


def evaluation(runs: list[Run]) -> Figure | None:
    """What the SP bypass changes: nothing in the result, all of the exchange, some of the speed."""
    both = [(n, r) for n, r in zip(labels(runs), runs, strict=True)
            if None not in (r.figure("eval.bypass.loss"), r.figure("eval.sp.loss"))]  # fmt: skip
    if not both:
        return None
    canvas = figure(9.5, 1.5 + 0.34 * len(both))
    left, right = canvas.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 1.1]})
    rows = range(len(both))
    losses = [max(abs(r.figure("eval.bypass.loss") - r.figure("eval.sp.loss")), ZERO_AT) for _, r in both]
    left.plot(losses, rows, linestyle="", marker="o", color=COLOURS[0], label="loss")
    logits = [(max(r.figure("eval.max_abs_logit_diff"), ZERO_AT), row) for row, (_, r) in zip(rows, both, strict=True)
              if r.figure("eval.max_abs_logit_diff") is not None]  # fmt: skip
    if logits:
        left.plot(*zip(*logits, strict=True), linestyle="", marker="D", markerfacecolor="none", color=COLOURS[1],
                  label="largest of a logit")  # fmt: skip
    _difference_axis(left, "x", 1e-5)
    left.set_xlabel("difference between bypass and sp (nats, logits)")
    left.set_yticks(list(rows), [label for label, _ in both])
    left.invert_yaxis()
    left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    for offset, mode, colour, hatch in ((-0.19, "bypass", COLOURS[0], ""), (0.19, "sp", COLOURS[4], "///")):
        speeds = [run.figure(f"eval.{mode}.tokens_per_second") or 0 for _, run in both]
        right.barh([row + offset for row in rows], speeds, height=0.36, color=to_rgba(colour, 0.85), hatch=hatch,
                   edgecolor="white", label=mode)  # fmt: skip
        for row, (speed, (_, run)) in enumerate(zip(speeds, both, strict=True)):
            calls = run.figure(f"eval.{mode}.all_to_all_calls")
            right.annotate(
                f" {of_count(calls)} all-to-alls", (speed, row + offset), va="center", fontsize=7, color=FAINT
            )
    right.set_xlim(0, right.get_xlim()[1] * 1.25)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: of_count(value)))
    right.set_xlabel("tokens per second, all ranks")
    right.grid(axis="y", visible=False)
    right.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return canvas


def reload(runs: list[Run]) -> Figure | None:
    """Source layout by target layout: does everything come back bit for bit?"""
    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        for cell in run.figure("reload.cells") or []:
            cells.setdefault((cell["source"], cell["target"]), []).append(cell)
    if not cells:
        return None
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
        text = "\n".join(f"{route} {of_seconds(seconds)}" for route, seconds in slowest.items())
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


def step_split(runs: list[Run]) -> Figure | None:
    """Where the seconds of an optimizer step go."""
    return _stacked(
        [
            (n, r.figure("train.step_split_s"))
            for n, r in zip(labels(runs), runs, strict=True)
            if r.figure("train.step_split_s")
        ],
        "seconds per optimizer step",
        of_seconds,
        1.0,
    )


def plan(runs: list[Run]) -> Figure | None:
    """Predicted peak memory of a rank by kind."""
    rows = []
    for label, run in zip(labels(runs), runs, strict=True):
        parts = run.figure("plan.peak_memory_bytes_per_rank")
        if parts:
            verdict = "" if run.figure("plan.fits") else " (does not fit)"
            rows.append((label + verdict, {kind: size for kind, size in parts.items() if kind != "total"}))
    return _stacked(rows, "predicted peak memory per rank (GiB)", of_bytes, GIB)


def plan_grid(runs: list[Run]) -> Figure | None:
    """The longest planned sequence of each layout, a bar for each choice of memory savers."""
    planned = [run for run in runs if run.layout and run.figure("plan.max_seq_len") is not None]
    lengths = {(run.layout, _memory(run)): int(run.figure("plan.max_seq_len")) for run in planned}
    layouts = sorted({layout for layout, _ in lengths if layout}, key=lambda layout: (layout.zero, layout))
    if len(layouts) < 2:
        return None
    longest_of = {name: max(n for (_, choice), n in lengths.items() if choice == name) for _, name in lengths}
    choices = sorted(longest_of, key=lambda name: longest_of[name])
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
    return canvas


def _memory(run: Run) -> str:
    """The choice of memory savers."""
    return traits(run).get("memory.name", "memory none").removeprefix("memory ")


def _binary(value: float, _: Any) -> str:
    """A power of two as sequence lengths are called: 128 K are 131,072."""
    return f"{value / 2**20:g} M" if value >= 2**20 else f"{value / 2**10:g} K" if value >= 2**10 else f"{value:g}"


def parity(runs: list[Run]) -> Figure | None:
    """How far each layout is from the single-process reference."""
    compared = [
        (n, r) for n, r in zip(labels(runs), runs, strict=True) if r.figure("parity.max_rel_loss_diff") is not None
    ]
    if not compared:
        return None
    canvas = figure(7.5, 1.4 + 0.32 * len(compared))
    axes = canvas.add_subplot()
    kinds = (
        ("loss", "max_rel_loss_diff"),
        ("gradient norm", "max_rel_grad_norm_diff"),
        ("weights", "max_rel_weight_diff"),
    )
    for index, (name, key) in enumerate(kinds):
        values = [max(run.figure(f"parity.{key}") or 0, ZERO_AT) for _, run in compared]
        style = series(index) | {"linestyle": ""}
        rows = [row + (index - 1) * 0.2 for row in range(len(compared))]
        axes.plot(values, rows, label=name, **style)
    allowed = max(run.figure("parity.tolerance") or 1e-6 for _, run in compared)
    of_weights = max(run.figure("parity.weight_tolerance") or allowed for _, run in compared)
    _difference_axis(axes, "x", allowed, {} if of_weights == allowed else {"weights": of_weights})
    axes.set_yticks(range(len(compared)), [label for label, _ in compared])
    axes.invert_yaxis()
    axes.set_xlabel(f"largest relative difference to {compared[0][1].figure('parity.reference')}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.2)
    return canvas


def _comparable(runs: list[Run]) -> list[Run]:
    """Runs at a length that was asked for; those that searched the longest have each their own."""
    return [run for run in runs if not run.figure("train.max_seq_len")]


def _ideal(panels: list[Axes], ideal: Callable[[np.ndarray, np.ndarray], np.ndarray], name: str) -> None:
    """A dotted line beside each line: what `ideal` makes of its sp and values."""
    dots: dict[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.0}
    for axes in panels:
        for drawn in axes.get_lines():
            sps, values = (np.asarray(data, dtype=float) for data in drawn.get_data())
            axes.plot(sps, ideal(sps, values), color=drawn.get_color(), label="_ideal", **dots)
        handles, names = axes.get_legend_handles_labels()
        axes.legend([*handles, Line2D([], [], color=FAINT, **dots)], [*names, name], loc="best")


def _length(run: Run) -> int:
    return run.seq_len or 0


def _sp(run: Run) -> int:
    return run.layout.sp if run.layout else 0


def _panels(
    runs: list[Run],
    axis: Callable[[Run], int],
    line: str,
    value: Callable[[Run], float],
    label: str,
    besides: Iterable[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Lines of `value` against `axis`, one for each value of trait `line`; a panel for each difference not `besides`.

    Panels without a line (one point each) are left out where others have one, and those beyond six.
    """
    on_axes = {line, "sp" if axis is _sp else "seq_len", *besides}
    names = [name for name in differing(runs) if name not in on_axes]
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        of_run = traits(run)
        points = found.setdefault(", ".join(of_run.get(name, "?") for name in names), {}).setdefault(of_run[line], {})
        points[axis(run)] = max(value(run), points.get(axis(run), 0))
    longest = {title: max(map(len, lines.values())) for title, lines in found.items()}
    shown = [title for title in found if longest[title] > 1 or max(longest.values()) == 1][:6]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    canvas = figure(1.6 + 3.2 * columns if columns > 1 else 5.6, 0.4 + 3.2 * rows)
    top = 1.08 * max(y for title in shown for points in found[title].values() for y in points.values())
    panels = []
    for number, title in enumerate(shown):
        axes = canvas.add_subplot(rows, columns, number + 1)
        for index, (name, points) in enumerate(found[title].items()):
            xs = sorted(points)
            axes.plot(xs, [points[x] for x in xs], label=name, **series(index))
        powers_of_two(axes, [x for points in found[title].values() for x in points], label)
        axes.set_ylim(0, top)
        axes.set_title(title)
        panels.append(axes)
    return canvas, panels


def _stacked(
    rows: list[tuple[str, dict[str, float]]], label: str, total: Callable[[float], str], unit: float
) -> Figure | None:
    if not rows:
        return None
    canvas = figure(8.5, 1.3 + 0.34 * len(rows))
    axes = canvas.add_subplot()
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    ends = [0.0] * len(rows)
    for index, kind in enumerate(kinds):
        sizes = [(parts.get(kind) or 0) / unit for _, parts in rows]
        axes.barh(range(len(rows)), sizes, left=ends, height=0.7, color=to_rgba(COLOURS[index % len(COLOURS)], 0.85),
                  hatch=HATCHES[index % len(HATCHES)], edgecolor="white", label=kind)  # fmt: skip
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for row, end in enumerate(ends):
        axes.annotate(" " + total(end * unit), (end, row), va="center", fontsize=8)
    axes.set_xlim(0, max(ends) * 1.14 or 1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(kinds), borderaxespad=0.2)
    return canvas


def _difference_axis(axes: Axes, which: str, allowed: float, others: dict[str, float] | None = None) -> None:
    """A logarithmic axis for differences, with a place for exactly zero and a line at what is allowed.

    Args:
        others: what has a limit of its own, by name.
    """
    largest = max(allowed, *(others or {}).values(), 0.0)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(ZERO_AT / 3, max(largest * 10, getattr(axes, f"get_{which}lim")()[1]))
    ticks = [ZERO_AT, *(10.0**e for e in range(-15, math.ceil(math.log10(largest)) + 2, 3))]
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks, ["0", *(f"1e{round(math.log10(t))}" for t in ticks[1:])])
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


_GRADES = (
    (COLOURS[0], "", "weights and optimizer bit-exact"),
    ("#9ecbe8", "", "weights bit-exact, no route restores the optimizer"),
    ("#f3c98b", "\\\\", "loads, not bit-exact"),
    ("#e8a07a", "///", "failed"),
)


def _grade(cell: dict) -> int:
    """Index into `_GRADES`, the higher the worse."""
    if cell.get("weights_bit_exact") is False or cell.get("optimizer_bit_exact") is False:
        return 2
    if cell.get("status") != "ok":
        return 3
    return 0 if cell.get("optimizer_bit_exact") else 1


def _grade_of_pair(cells: list[dict]) -> int:
    """The worst that went wrong; where nothing did, the route that brings back most."""
    grades = [_grade(cell) for cell in cells]
    return max(grades) if max(grades) > 1 else min(grades)


def _layout_order(name: str) -> tuple:
    try:
        layout = Layout.parse(name)
    except ValueError:
        return (1, name)
    return (0, layout)


_PICTURES: tuple[tuple[str, str, str, Callable[[list[Run]], Figure | None]], ...] = (
    (
        "throughput",
        "Throughput",
        "Tokens of all ranks together, each counted once, warm-up steps left out.",
        throughput,
    ),
    (
        "memory",
        "Peak memory",
        "The worst rank's peak; on CPU that of its whole process, some 300 MiB of imported libraries included. Dotted: "
        "what sharding everything perfectly over sp would give.",
        memory,
    ),
    (
        "costs",
        "Memory and time",
        "At one sp and one length. Memory on CPU is that of the whole process, some 300 MiB of imported libraries "
        "included; warm-up steps are left out of the time.",
        costs,
    ),
    (
        "longest",
        "Longest sequence",
        "Found by trying, in a limited memory of each rank. Dotted: in proportion to sp.",
        longest,
    ),
    (
        "loss",
        "Training loss",
        "Runs that differ only in their layout must draw one line. Where there are several, the lower part shows how "
        "far each is from the first; a difference of exactly zero is drawn at 0.",
        loss,
    ),
    (
        "eval",
        "Evaluation: SP bypass beside SP",
        "Left: how much the two results differ. Right: their speed, and how many all-to-all calls each made.",
        evaluation,
    ),
    (
        "reload",
        "Reload across layouts",
        "Each pair with its routes and their times. A route that fails gives the pair its colour. Grey: not tried.",
        reload,
    ),
    ("step_split", "Step time", "Where the time of an optimizer step goes.", step_split),
    (
        "parity",
        "Parity",
        "Against one process without ZeRO over the same tokens. A difference of exactly zero is drawn at 0.",
        parity,
    ),
    ("plan", "Plan", "Predicted without running the model, by kind of memory.", plan),
    (
        "plan_grid",
        "Which layouts fit which length",
        "Predicted without running the model: a layout fits every length that its bar reaches.",
        plan_grid,
    ),
)

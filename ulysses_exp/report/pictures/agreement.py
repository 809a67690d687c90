"""Results that have to agree: evaluation with and without SP, and each layout with one process."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.colors import to_rgba
from matplotlib.ticker import FuncFormatter

from ulysses_exp.report.groups import FEW, Group, rows
from ulysses_exp.report.pictures.axes import ZERO_AT, difference_axis, row_names
from ulysses_exp.report.pictures.drawn import Drawn
from ulysses_exp.report.pictures.spread import spread
from ulysses_exp.report.runs import Run
from ulysses_exp.report.style import COLOURS, FAINT, figure, series
from ulysses_exp.report.units import of_count


def evaluation(runs: list[Run]) -> Drawn | None:
    """What the SP bypass changes: nothing in the result, all of the exchange, some of the speed."""
    both = [run for run in runs if _difference(run) is not None]
    if not both:
        return None
    groups = rows(both, lambda run: run.figure("eval.sp.tokens_per_second"))
    canvas = figure(9.5, 1.5 + 0.34 * len(groups))
    left, right = canvas.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 1.1]})
    places = range(len(groups))
    losses = [max(_worst(group, _difference) or 0.0, ZERO_AT) for group in groups]
    left.plot(losses, places, linestyle="", marker="o", color=COLOURS[0], label="loss")
    logits = [(max(worst, ZERO_AT), row) for row, group in zip(places, groups, strict=True)
              if (worst := _worst(group, lambda run: run.figure("eval.max_abs_logit_diff"))) is not None]  # fmt: skip
    if logits:
        left.plot(*zip(*logits, strict=True), linestyle="", marker="D", markerfacecolor="none", color=COLOURS[1],
                  label="largest of a logit")  # fmt: skip
    difference_axis(left, "x", 1e-5)
    left.set_xlabel("difference between bypass and sp (nats, logits)")
    row_names(left, [group.label for group in groups])
    left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    for offset, mode, colour, hatch in ((-0.19, "bypass", COLOURS[0], ""), (0.19, "sp", COLOURS[4], "///")):
        speeds = [_middle(group, f"eval.{mode}.tokens_per_second") or 0.0 for group in groups]
        right.barh([row + offset for row in places], speeds, height=0.36, color=to_rgba(colour, 0.85), hatch=hatch,
                   edgecolor="white", label=mode)  # fmt: skip
        for row, (speed, group) in enumerate(zip(speeds, groups, strict=True)):
            calls = _middle(group, f"eval.{mode}.all_to_all_calls")
            right.annotate(
                f" {of_count(calls)} all-to-alls", (speed, row + offset), va="center", fontsize=7, color=FAINT
            )
    right.set_xlim(0, right.get_xlim()[1] * 1.25)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: of_count(value)))
    right.set_xlabel("tokens per second, all ranks")
    right.grid(axis="y", visible=False)
    right.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return Drawn(canvas, _note(both, "the largest difference and the median speed"))


def parity(runs: list[Run]) -> Drawn | None:
    """How far each layout is from the single-process reference."""
    compared = [run for run in runs if run.figure("parity.max_rel_loss_diff") is not None]
    if not compared:
        return None
    groups = rows(compared, lambda run: run.figure("parity.max_rel_loss_diff"))
    canvas = figure(7.5, 1.4 + 0.32 * len(groups))
    axes = canvas.add_subplot()
    kinds = (
        ("loss", "max_rel_loss_diff"),
        ("gradient norm", "max_rel_grad_norm_diff"),
        ("weights", "max_rel_weight_diff"),
    )
    for index, (name, key) in enumerate(kinds):
        values = [max(run.figure(f"parity.{key}") or 0.0 for run in group.runs) for group in groups]
        places = [row + (index - 1) * 0.2 for row in range(len(groups))]
        axes.plot([max(value, ZERO_AT) for value in values], places, label=name, **(series(index) | {"linestyle": ""}))
    allowed = max(run.figure("parity.tolerance") or 1e-6 for run in compared)
    of_weights = max(run.figure("parity.weight_tolerance") or allowed for run in compared)
    difference_axis(axes, "x", allowed, {} if of_weights == allowed else {"weights": of_weights})
    row_names(axes, [group.label for group in groups])
    axes.set_xlabel(f"largest relative difference to {compared[0].figure('parity.reference')}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.2)
    return Drawn(canvas, _note(compared, "the largest difference"))


def _note(runs: list[Run], what: str) -> str:
    return f"Of each group {what}; how many runs it has is in brackets ({len(runs):,} runs)." if len(runs) > FEW else ""


def _difference(run: Run) -> float | None:
    bypass, sp = run.figure("eval.bypass.loss"), run.figure("eval.sp.loss")
    return None if bypass is None or sp is None else abs(bypass - sp)


def _worst(group: Group, value: Callable[[Run], float | None]) -> float | None:
    return max((found for run in group.runs if (found := value(run)) is not None), default=None)


def _middle(group: Group, key: str) -> float | None:
    known = [found for run in group.runs if (found := run.figure(key)) is not None]
    return spread(known)[1] if known else None

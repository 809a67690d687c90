"""What the report says, before it is HTML, Markdown or a table on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ulysses_exp.report.groups import FEW, explaining
from ulysses_exp.report.pictures import Picture, draw
from ulysses_exp.report.runs import Run
from ulysses_exp.report.table import Table, best_first, table
from ulysses_exp.report.traits import labels
from ulysses_exp.report.troubles import troubles
from ulysses_exp.report.units import of_bytes, of_count, of_loss


@dataclass(frozen=True)
class Page:
    """The parts of a report; all texts are plain ones, to be escaped for where they go."""

    title: str
    about: str  # a line below the title
    highlights: list[str]  # of many runs: the best ones, and what their loss depends on
    table: Table
    sorted_by: str  # the title of a column where the best run comes first; empty: by model, length and layout
    troubles: list[tuple[str, str]]  # (which runs, reason)
    pictures: list[Picture]
    runs: list[Run]  # in the order of the table


def page(title: str, runs: list[Run]) -> Page:
    """The report of `runs`. Many runs are shown best first."""
    counts = ", ".join(f"{n:,} {status}" for status, n in Counter(run.status for run in runs).items())
    models = sorted({run.model for run in runs} - {"?"})
    named = ", ".join(models[:5]) + (f" and {len(models) - 5} more" if len(models) > 5 else "") or "unknown model"
    about = f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'} ({counts}) of {named}"
    many = len(runs) > FEW
    shown, sorted_by = best_first(runs) if many else (runs, "")
    if many:
        about += ", best first"
    return Page(
        title, about, _highlights(shown) if many else [], table(shown), sorted_by, troubles(runs), draw(runs), shown
    )


def _highlights(runs: list[Run]) -> list[str]:
    kinds: tuple[tuple[str, Callable[[Run], float | None], Callable[[float | None], str], int], ...] = (
        ("lowest loss", lambda run: run.last_loss, of_loss, 1),
        ("fastest", lambda run: run.figure("train.tokens_per_second"), lambda n: f"{of_count(n)} tokens/s", -1),
        ("least memory", lambda run: run.figure("train.peak_memory_bytes.max"), of_bytes, 1),
    )
    label_of = dict(zip(map(id, runs), labels(runs), strict=True))
    found = []
    for name, value, text, sign in kinds:
        known = [(run, figure) for run in runs if run.status == "ok" and (figure := value(run)) is not None]
        if known:
            run, figure = min(known, key=lambda entry: sign * entry[1])
            found.append(f"{name}: {text(figure)}, {label_of[id(run)]}")
    if causes := explaining(runs, lambda run: run.last_loss)[:3]:
        shares = ", ".join(f"{axis.title} ({axis.explains:.0%})" for axis in causes)
        found.append(f"what the loss depends on (share of the variance of its ranks): {shares}")
    return found

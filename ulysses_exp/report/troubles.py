"""What is not ok: damaged, failed, interrupted, skipped, running, or with a loss that is no number."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ulysses_exp.report.groups import FEW
from ulysses_exp.report.runs import Run
from ulysses_exp.report.traits import labels

_ALONE = 3  # as many runs with the same trouble have a line each
_FIGURES = 3  # that are not finite are named


def troubles(runs: list[Run]) -> list[tuple[str, str]]:
    """(which runs, reason) for everything that is not ok: jobs, stages and reload cells.

    Skipped jobs stand together where their reasons differ in nothing but numbers, others where more than three have the
    same; of many runs, others too where they differ in numbers only.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    many = len(runs) > FEW
    for label, run in zip(labels(runs), runs, strict=True):
        for reason in _of(run):
            reason = " ".join(reason.split())
            alike = re.sub(r"\d+", "#", reason) if run.status == "skipped" or many else reason
            found.setdefault((run.status, alike), []).append((label, reason))
    lines = []
    for (status, _), members in found.items():
        if len(members) <= (1 if status == "skipped" else _ALONE):
            lines += members
            continue
        label, reason = members[0]
        like = "" if len({text for _, text in members}) == 1 else " (and the like)"
        lines.append((f"{label} and {len(members) - 1:,} more", reason + like))
    return lines


def _of(run: Run) -> Iterator[str]:
    """One sentence for each trouble of a run."""
    said = str(run.results.get("status", "unfinished"))
    if run.damaged:
        yield f"damaged: {'; '.join(run.damaged)}"
    if said == "unfinished" and not run.damaged:
        yield f"has not finished; {_steps(run)} so far"
    elif said == "running":
        yield f"is running; {_steps(run)} so far"
    elif said in ("skipped", "interrupted"):
        yield f"{said}: {run.results.get('error') or 'no reason given'}"
    if run.diverged:
        first, count = run.diverged[0], len(run.diverged)
        after = sum(step >= first for step in run.losses)
        yield (
            f"loss is not finite from step {first:,} on"
            if count == after
            else f"loss is not finite at {count:,} of {len(run.losses):,} steps, first at step {first:,}"
        )
    if run.not_finite:
        more = f" and {len(run.not_finite) - _FIGURES} more" if len(run.not_finite) > _FIGURES else ""
        yield f"not finite: {', '.join(run.not_finite[:_FIGURES])}{more}"
    reasons = list(_of_stages(run))
    if said == "failed" and not reasons:
        reasons.append(str(run.results.get("error") or "no reason given"))
    yield from reasons


def _of_stages(run: Run) -> Iterator[str]:
    for name, stage in run.results["stages"].items():
        cells = [cell for cell in stage.get("cells") or [] if cell.get("status") != "ok"]
        for cell in cells:
            yield f"reload at {cell.get('target')} by {cell.get('route')}: {cell.get('reason')}"
        if stage.get("status") not in ("ok", "running", None) and not cells:
            yield f"stage {name}: {stage.get('reason', 'no reason given')}"


def _steps(run: Run) -> str:
    return f"{len(run.losses):,} {'step' if len(run.losses) == 1 else 'steps'}"

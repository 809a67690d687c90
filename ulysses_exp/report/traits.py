"""What tells runs apart: the layout and every setting in which they differ."""

from __future__ import annotations

from collections import Counter

from ulysses_exp.report.plain import ends
from ulysses_exp.report.runs import Run, short_key

_MOST = 12  # of the traits in which runs differ as many are shown

_LONGEST = 100  # characters of a label

LAYOUT = ("sp", "dp", "zero")


def heading(trait: str) -> str:
    """A trait's name above a column or beside a panel."""
    return {"seq_len": "tokens", "zero": "ZeRO"}.get(trait, short_key(trait))


def differing(runs: list[Run]) -> list[str]:
    """The traits in which `runs` are not all the same, twelve at most."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.traits.items():
            values.setdefault(name, set()).add(value)
    several = [name for name, found in values.items() if len(found - {"?"}) > 1]
    return [name for name in several if not _told_by_name(name, runs)][:_MOST]


def _told_by_name(trait: str, runs: list[Run]) -> bool:
    """Whether the choice of the trait's group says it all: another choice changes many of the group's settings."""
    group = f"{trait.split('.')[0]}.name"
    if trait == group or "." not in trait:
        return False
    values: dict[str | None, set[str | None]] = {}
    for run in runs:
        of_run = run.traits
        values.setdefault(of_run.get(group), set()).add(of_run.get(trait))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def _joined(parts: list[str]) -> str:
    return ends(", ".join(parts), _LONGEST)


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run: its layout and whatever else tells it from the others."""
    names = [name for name in differing(runs) if name not in LAYOUT]
    short = [
        _joined(
            [run.layout.name if run.layout else run.name, *(run.traits[name] for name in names if name in run.traits)]
        )
        for run in runs
    ]
    count = Counter(short)
    return [f"{text} ({run.place})" if count[text] > 1 else text for text, run in zip(short, runs, strict=True)]

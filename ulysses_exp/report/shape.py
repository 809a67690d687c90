"""What the report reads of results.json, and of which type each value has to be.

Views use what is named here and nothing else. A value of another type is left out and noted, so that a view finds
either a sound value or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ulysses_exp.report.plain import line

#: No figure of a run is as large; beyond, sums and axes would overflow
LARGEST = 1e30
SHORT, NAME, REASON = 24, 60, 600  # characters that are shown of a layout's name, of other names, of a reason
STATUSES = ("ok", "failed", "interrupted", "skipped", "running")


@dataclass
class Findings:
    """What was wrong with the files of a run."""

    damaged: list[str] = field(default_factory=list)  # `where: what`, each left out of the run
    not_finite: list[str] = field(default_factory=list)  # figures that are NaN or infinite, by their place

    def wrong(self, where: str, what: str) -> None:
        """Notes a value that is left out."""
        self.damaged.append(f"{where} {what}")


#: Takes a value of a file, its place for people, and where to note what is wrong; gives what views see, or None
Reader = Callable[[Any, str, Findings], Any]


def number(value: Any, where: str, found: Findings) -> float | int | None:
    """A finite number that is not negative."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found.wrong(where, f"is {kind(value)}, not a number")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        found.not_finite.append(where)
        return None
    if not 0 <= value <= LARGEST:
        found.wrong(where, "is negative" if value < 0 else "is larger than anything that is measured here")
        return None
    return value


def whole(value: Any, where: str, found: Findings) -> int | None:
    """A whole number up to 2^53, not negative."""
    value = number(value, where, found)
    if value is None:
        return None
    if value != int(value) or value > 2**53:
        found.wrong(where, "is no whole number")
        return None
    return int(value)


def flag(value: Any, where: str, found: Findings) -> bool | None:
    """True or false."""
    if value is not None and not isinstance(value, bool):
        found.wrong(where, f"is {kind(value)}, not true or false")
        return None
    return value


def short(value: Any, where: str, found: Findings) -> str | None:
    """The name of a layout or a route."""
    return _text(value, where, found, SHORT)


def name(value: Any, where: str, found: Findings) -> str | None:
    """A short text."""
    return _text(value, where, found, NAME)


def reason(value: Any, where: str, found: Findings) -> str | None:
    """A sentence or two, in one line."""
    return _text(value, where, found, REASON)


def status(value: Any, where: str, found: Findings) -> str | None:
    """One of `STATUSES`."""
    text = _text(value, where, found, NAME)
    if text is not None and text not in STATUSES:
        found.wrong(where, f"is {text!r}, not one of {', '.join(STATUSES)}")
        return None
    return text


def series(value: Any, where: str, found: Findings) -> list[float] | None:
    """A number a step; NaN where it is not finite."""
    if value is None:
        return None
    if not isinstance(value, list):
        found.wrong(where, f"is {kind(value)}, not a list")
        return None
    numbers = []
    for index, item in enumerate(value):
        if item is not None and (isinstance(item, bool) or not isinstance(item, (int, float))):
            found.wrong(where, f"holds {kind(item)} at place {index + 1}")
            return None
        numbers.append(loss_of(item))
    return numbers


def loss_of(value: float | None) -> float:
    """A loss as it was written: NaN where it is null, infinite or beyond what can be drawn."""
    return float(value) if value is not None and -LARGEST <= value <= LARGEST else math.nan


def fields(**readers: Reader) -> Reader:
    """A dictionary with these entries; others are not looked at."""

    def read(value: Any, where: str, found: Findings) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            found.wrong(where, f"is {kind(value)}, not a dictionary")
            return None
        read = {key: reader(value[key], place(where, key), found) for key, reader in readers.items() if key in value}
        return {key: item for key, item in read.items() if item is not None}

    return read


def needed(reader: Reader) -> Reader:
    """What may be absent, but not null."""

    def read(value: Any, where: str, found: Findings) -> Any:
        if value is None:
            found.wrong(where, "is null")
        return reader(value, where, found)

    return read


def named(reader: Reader, most: int) -> Reader:
    """A dictionary from names to values of one type, `most` at most."""

    def read(value: Any, where: str, found: Findings) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > most:
            found.wrong(where, f"is {kind(value)}, not a dictionary of up to {most} entries")
            return None
        items = {line(key, SHORT): reader(item, place(where, line(key, SHORT)), found) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None}

    return read


def each(reader: Reader, most: int) -> Reader:
    """A list of values of one type, `most` at most."""

    def read(value: Any, where: str, found: Findings) -> list[Any] | None:
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > most:
            found.wrong(where, f"is {kind(value)}, not a list of up to {most} entries")
            return None
        items = [reader(item, f"{where}[{index}]", found) for index, item in enumerate(value)]
        return [item for item in items if item is not None]

    return read


def _text(value: Any, where: str, found: Findings, longest: int) -> str | None:
    if value is not None and not isinstance(value, str):
        found.wrong(where, f"is {kind(value)}, not a text")
        return None
    return None if value is None else line(value, longest)


def place(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def kind(value: Any) -> str:
    """What people call the type."""
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "true or false"), (dict, "a dictionary"), (list, "a list"), (str, "a text"), ((int, float), "a number"),
    )  # fmt: skip
    return "null" if value is None else next(text for kind, text in kinds if isinstance(value, kind))

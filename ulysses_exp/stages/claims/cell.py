"""A claim, measured once: on one side, at one layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HOLDS, HOLDS_IF, DOES_NOT, NOT_TRIED = VERDICTS = ("holds", "holds if", "does not hold", "not tried")


@dataclass(frozen=True)
class Cell:
    """`verdict` is one of VERDICTS; `why` says if what, what happens instead, or why it was not tried."""

    claim: str
    side: str
    layout: str
    verdict: str
    figure: str
    why: str = ""
    finding: int | None = None  # its number in docs/findings.md, where upstream does not do as it says
    details: dict[str, Any] = field(default_factory=dict)  # figures that pictures are drawn of

    def as_dict(self) -> dict[str, Any]:
        """Its entry in results.json, below claim, side and layout."""
        entry: dict[str, Any] = {"verdict": self.verdict, "figure": self.figure}
        if self.why:
            entry["why"] = self.why
        if self.finding is not None:
            entry["finding"] = self.finding
        return entry | self.details

"""What a painter of the report gives back."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """A figure, and what its reader has to know beyond the picture's caption, e.g. that it shows medians."""

    figure: Figure
    note: str = ""

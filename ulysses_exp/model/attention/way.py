"""How a forward of a registered model runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from ulysses_exp.model.attention.core import Plan


@dataclass(frozen=True)
class Way:
    """Over slices, over whole sequences, or as transformers does it."""

    plan: Plan | None  # None: as transformers does it
    group: ProcessGroup | None = None  # whose ranks share the sequences; None: each rank has whole ones

    @property
    def shared(self) -> bool:
        """Over slices."""
        return self.group is not None

    @property
    def untouched(self) -> bool:
        """What runs over whole sequences without documents is what transformers runs."""
        return self.plan is None or (self.group is None and self.plan.documents.plain)

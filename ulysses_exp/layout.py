"""The one vocabulary of parallelism: how many ranks there are and what each of them holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"sp([0-9]{1,7})-dp([0-9]{1,7})-z([0-3])")


@dataclass(frozen=True, order=True)
class Layout:
    """`sp` ranks share a sequence, `dp` such groups hold different ones, ZeRO `zero` shards states over all ranks.

    Ranks of a sequence-parallel group are contiguous, as in `deepspeed.runtime.sequence_parallel.parallel_state_sp`.
    """

    sp: int = 1
    dp: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        if self.sp < 1 or self.dp < 1 or self.zero not in (0, 1, 2, 3):
            raise ValueError(f"no such layout: sp={self.sp}, dp={self.dp}, zero={self.zero}")

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Reads a short name such as `sp2-dp1-z3`. Raises ValueError for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a layout; write sp<ranks>-dp<replicas>-z<ZeRO stage>, e.g. sp2-dp1-z3")
        sp, dp, zero = map(int, match.groups())
        return cls(sp, dp, zero)

    @property
    def name(self) -> str:
        return f"sp{self.sp}-dp{self.dp}-z{self.zero}"

    def __str__(self) -> str:
        return self.name

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.sp * self.dp

    def sp_rank(self, rank: int) -> int:
        """Which slice of the sequence `rank` holds."""
        return rank % self.sp

    def dp_rank(self, rank: int) -> int:
        """Which sequences `rank` works on."""
        return rank // self.sp

    def sp_group(self, rank: int) -> range:
        """The ranks that share `rank`'s sequences."""
        first = self.dp_rank(rank) * self.sp
        return range(first, first + self.sp)

    def accumulation(self, global_batch: int, micro_batch: int) -> int:
        """Micro steps per optimizer step; `config.check` has made sure that it is a whole number."""
        return global_batch // (self.dp * micro_batch)

    def as_dict(self) -> dict[str, int | str]:
        """The `layout` entry of results.json."""
        return {"world": self.world, "sp": self.sp, "dp": self.dp, "zero": self.zero, "name": self.name}


#: The world is the product; a single process without ZeRO is what every other layout has to reproduce.
REFERENCE = Layout(1, 1, 0)

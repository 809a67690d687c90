"""Which heads and which queries a rank of a sequence-parallel group attends for.

Ulysses (arXiv 2309.14509) gives each rank the sp-th part of the heads. Where sp does not divide them, ranks get runs of
heads whose lengths differ by one. Where there are more ranks than heads, sp = u x c: heads over u ranks, and the
queries of the same heads over c, each of which holds all their keys and values. Of 2c chunks a rank takes the i-th and
the i-th from the end, so that all have as many scores to compute (Llama 3's context parallelism, arXiv 2407.21783,
section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

Run = tuple[int, int]  # first and one past the last


def even_run(heads: int, part: int, parts: int) -> Run:
    """Heads, shared out in runs whose lengths differ by one at most."""
    return heads * part // parts, heads * (part + 1) // parts


def used_by(run: Run, heads: int, groups: int) -> Run:
    """The groups (KV heads) that a run of `heads` uses, of which heads / groups consecutive ones share each."""
    first, last = run
    return (first * groups // heads, (last - 1) * groups // heads + 1) if first < last else (0, 0)


def group_of_each(run: Run, heads: int, groups: int) -> list[int]:
    """For each head of a run its group, counted among those of `used_by`."""
    start = used_by(run, heads, groups)[0]
    return [head * groups // heads - start for head in range(*run)]


@dataclass(frozen=True)
class HeadShares:
    """Of `heads` query heads over `sp` ranks; rank r is part r % u of the heads and part r // u of the queries."""

    sp: int
    heads: int

    @property
    def u(self) -> int:
        """Ranks that the heads are shared out over: all, or of more ranks than heads as many as compute evenly."""
        if self.sp <= self.heads:
            return self.sp
        divisors = [u for u in range(1, self.heads + 1) if self.sp % u == 0]
        return min(divisors, key=lambda u: (-(-self.heads // u) * u / self.heads, -u))

    @property
    def c(self) -> int:
        """Ranks that share the queries of the same heads; each holds all keys and values of these heads."""
        return self.sp // self.u

    def run(self, rank: int) -> Run:
        """The query heads of a rank."""
        return even_run(self.heads, rank % self.u, self.u)

    def kv_run(self, rank: int, kv_heads: int) -> Run:
        """The KV heads that the query heads of a rank use."""
        return used_by(self.run(rank), self.heads, kv_heads)

    def rows(self, rank: int, seq_len: int) -> tuple[Run, ...] | None:
        """The places of the queries of a rank in the whole sequence; None: all."""
        if self.c == 1:
            return None
        part, chunks = rank // self.u, 2 * self.c
        edges = [seq_len * n // chunks for n in range(chunks + 1)]
        both = (part, chunks - 1 - part)
        return tuple((edges[n], edges[n + 1]) for n in both)

    def even(self, kv_heads: int) -> bool:
        """Every rank has as many query heads, and KV heads that no other part of a run needs."""
        return self.heads % self.sp == 0 and (kv_heads % self.sp == 0 or self.sp % kv_heads == 0)

    @property
    def imbalance(self) -> float:
        """Query heads of the busiest rank over the mean; 1 is even."""
        return max(b - a for a, b in (self.run(r) for r in range(self.u))) * self.u / self.heads

    @property
    def words(self) -> str | None:
        """What there is to say of shares that are not even; None where they are."""
        if self.sp == 1 or (self.c == 1 and self.heads % self.sp == 0):
            return None
        if self.c == 1:
            return f"{self.heads} heads on {self.sp} ranks: {self.imbalance:.2f} of even"
        how = "" if self.imbalance == 1 else f", {self.imbalance:.2f} of even"
        return f"{self.heads} heads on {self.sp} ranks: heads over {self.u}, queries over {self.c}{how}"

"""The exchange where heads do not divide over the ranks, or there are more ranks than heads.

One all-to-all with sizes of its own for every pair of ranks, as the fused exchange has one with equal sizes. A rank
sends each other rank, of its slice, the queries that the other attends for, and of all its tokens the keys and values
of the KV heads that the other's query heads use (`config.head_shares`).
Data keep their order: that queries are shared out in zigzag is seen here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_exp.config.head_shares import HeadShares, Run, group_of_each


@dataclass(frozen=True)
class Routes:
    """What goes from rank to rank of a group, for slices of `tokens` tokens."""

    shares: HeadShares
    kv_heads: int
    tokens: int

    @property
    def sp(self) -> int:
        return self.shares.sp

    def queries(self, source: int, target: int) -> list[slice]:
        """Of `source`'s slice, the tokens whose queries `target` attends for."""
        rows = self.shares.rows(target, self.tokens * self.sp)
        start = source * self.tokens
        if rows is None:
            return [slice(0, self.tokens)]
        cut = [(max(a, start) - start, min(b, start + self.tokens) - start) for a, b in rows]
        return [slice(a, b) for a, b in cut if a < b]


def _ranges(routes: Routes, rank: int) -> list[list[slice]]:
    """Where the queries of each source lie among those of `rank`, which are in the order of `shares.rows`."""
    rows = routes.shares.rows(rank, routes.tokens * routes.sp)
    if rows is None:
        return [[slice(s * routes.tokens, (s + 1) * routes.tokens)] for s in range(routes.sp)]
    found: list[list[slice]] = []
    for source in range(routes.sp):
        begin, end = source * routes.tokens, (source + 1) * routes.tokens
        places, offset = [], 0
        for a, b in rows:
            first, last = max(a, begin), min(b, end)
            if first < last:
                places.append(slice(offset + first - a, offset + last - a))
            offset += b - a
        found.append(places)
    return found


def _heads(routes: Routes, rank: int) -> tuple[slice, slice]:
    return slice(*routes.shares.run(rank)), slice(*routes.shares.kv_run(rank, routes.kv_heads))


def exchange_parts(
    like: Tensor, parts: list[list[Tensor]], shapes: list[list[torch.Size]], group: ProcessGroup
) -> list[list[Tensor]]:
    """Sends `parts[r]` to rank r; what came from rank r has the shapes `shapes[r]`. Tensors are as `like`."""
    send = like.new_empty(sum(x.numel() for part in parts for x in part))
    slots = iter(send.split([x.numel() for part in parts for x in part]))
    for x in (x for part in parts for x in part):
        next(slots).view(x.shape).copy_(x)
    sizes = [[shape.numel() for shape in part] for part in shapes]
    received = like.new_empty(sum(map(sum, sizes)))
    torch.distributed.all_to_all_single(
        received, send, [sum(s) for s in sizes], [sum(x.numel() for x in part) for part in parts], group=group
    )
    flat = iter(received.split([n for part in sizes for n in part]))
    return [[next(flat).view(shape) for shape in part] for part in shapes]


def _shapes(
    batch: int, heads: tuple[slice, slice], places: list[slice], tokens: int, widths: tuple[int, int, int]
) -> list[torch.Size]:
    """Of the queries of some heads at `places`, and of keys and values of some KV heads at all tokens."""
    own, own_kv = (h.stop - h.start for h in heads)
    queries = [torch.Size((batch, own, p.stop - p.start, widths[0])) for p in places]
    return queries + [torch.Size((batch, own_kv, tokens, w)) for w in widths[1:]]


def _places(lists: list[list[slice]]) -> Iterator[tuple[int, slice]]:
    for rank, slices in enumerate(lists):
        for place in slices:
            yield rank, place


class _ToHeads(torch.autograd.Function):
    """From all heads of a slice to the heads of this rank: its queries, and all keys and values of its KV heads."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, routes: Routes, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.routes, ctx.group = routes, group
        me = torch.distributed.get_rank(group)
        batch = query.shape[0]
        ctx.widths = widths = (query.shape[3], key.shape[3], value.shape[3])
        parts, shapes = [], []
        mine, mine_kv = _heads(routes, me)
        for rank in range(routes.sp):
            heads, kv = _heads(routes, rank)
            of_rank = [query[:, heads, place] for place in routes.queries(me, rank)]
            parts.append([*of_rank, key[:, kv], value[:, kv]])
            shapes.append(_shapes(batch, (mine, mine_kv), routes.queries(rank, me), routes.tokens, widths))
        got = exchange_parts(query, parts, shapes, group)
        places = _ranges(routes, me)
        total = sum(p.stop - p.start for _, p in _places(places))
        out = query.new_empty(batch, mine.stop - mine.start, total, widths[0])
        for rank, where in enumerate(places):
            for place, part in zip(where, got[rank], strict=False):
                out[:, :, place] = part
        return out, torch.cat([g[-2] for g in got], dim=2), torch.cat([g[-1] for g in got], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        routes, group, widths = ctx.routes, ctx.group, ctx.widths
        me = torch.distributed.get_rank(group)
        of_query, of_key, of_value = grads
        batch = of_query.shape[0]
        places = _ranges(routes, me)
        parts, shapes = [], []
        for rank in range(routes.sp):
            slice_of = slice(rank * routes.tokens, (rank + 1) * routes.tokens)
            parts.append([*(of_query[:, :, p] for p in places[rank]), of_key[:, :, slice_of], of_value[:, :, slice_of]])
            heads, kv = _heads(routes, rank)
            shapes.append(_shapes(batch, (heads, kv), routes.queries(me, rank), routes.tokens, widths))
        got = exchange_parts(of_query, parts, shapes, group)
        sizes = (routes.shares.heads, routes.kv_heads, routes.kv_heads)
        dq, dk, dv = (of_query.new_zeros(batch, routes.tokens, n, w).transpose(1, 2)
                      for n, w in zip(sizes, widths, strict=True))  # fmt: skip
        for rank in range(routes.sp):
            heads, kv = _heads(routes, rank)
            for place, part in zip(routes.queries(me, rank), got[rank], strict=False):
                dq[:, heads, place] = part
            dk[:, kv] += got[rank][-2]
            dv[:, kv] += got[rank][-1]
        return dq, dk, dv, None, None


class _ToTokens(torch.autograd.Function):
    """The way back: [batch, queries of this rank, its heads, dim] -> [batch, tokens, all heads x dim]."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, routes: Routes, group: ProcessGroup) -> Tensor:
        ctx.routes, ctx.group = routes, group
        me = torch.distributed.get_rank(group)
        batch, _, _, dim = context.shape
        places = _ranges(routes, me)
        parts = [[context[:, p] for p in places[rank]] for rank in range(routes.sp)]
        shapes = []
        for rank in range(routes.sp):
            first, last = routes.shares.run(rank)
            shapes.append([torch.Size((batch, p.stop - p.start, last - first, dim)) for p in routes.queries(me, rank)])
        got = exchange_parts(context, parts, shapes, group)
        out = context.new_empty(batch, routes.tokens, routes.shares.heads, dim)
        for rank in range(routes.sp):
            heads = slice(*routes.shares.run(rank))
            for place, part in zip(routes.queries(me, rank), got[rank], strict=True):
                out[:, place, heads] = part
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        routes, group = ctx.routes, ctx.group
        me = torch.distributed.get_rank(group)
        grad = grads[0].unflatten(2, (routes.shares.heads, -1))
        batch, _, _, dim = grad.shape
        parts = [
            [grad[:, place, slice(*routes.shares.run(rank))] for place in routes.queries(me, rank)]
            for rank in range(routes.sp)
        ]
        first, last = routes.shares.run(me)
        shapes = [
            [torch.Size((batch, p.stop - p.start, last - first, dim)) for p in routes.queries(rank, me)]
            for rank in range(routes.sp)
        ]
        got = exchange_parts(grad, parts, shapes, group)
        places = _ranges(routes, me)
        total = sum(p.stop - p.start for _, p in _places(places))
        out = grad.new_empty(batch, total, last - first, dim)
        for rank, where in enumerate(places):
            for place, part in zip(where, got[rank], strict=True):
                out[:, place] = part
        return out, None, None


def for_each_head(x: Tensor, dim: int, run: Run, heads: int, groups: int) -> Tensor:
    """`x`, whose dimension `dim` is the groups that a run of heads uses: as it is where the heads share them evenly,
    else one for each head."""
    wanted, held = group_of_each(run, heads, groups), x.shape[dim]
    each = len(wanted) // max(1, held)
    if wanted == [group for group in range(held) for _ in range(each)]:
        return x
    return x.index_select(dim, torch.tensor(wanted, dtype=torch.int64, device=x.device))


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, routes: Routes, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, tokens, dim] of a slice each -> the queries of this rank's heads, [batch, heads, queries, dim],
    and their keys and values over the whole sequence, a KV head for each query head where groups are cut."""
    query, key, value = _ToHeads.apply(query, key, value, routes, group)
    run = routes.shares.run(torch.distributed.get_rank(group))
    key, value = (for_each_head(x, 1, run, routes.shares.heads, routes.kv_heads) for x in (key, value))
    return query, key, value


def to_tokens(context: Tensor, routes: Routes, group: ProcessGroup) -> Tensor:
    """[batch, queries, heads, dim] of this rank -> [batch, tokens, all heads x dim] of its slice."""
    out: Tensor = _ToTokens.apply(context, routes, group)
    return out

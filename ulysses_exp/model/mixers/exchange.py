"""Exchanges around a scan or a convolution: sequence for heads and back, and the last columns of the rank before.

All three are one all-to-all with sizes of its own for each pair of ranks (`attention.uneven.exchange_parts`), forward
and backward; the backward is the transpose, so what a rank sent to several others comes back as a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_exp.config.head_shares import Run, even_run, used_by
from ulysses_exp.model.attention.uneven import exchange_parts, for_each_head


def own(heads: int, sp: int) -> list[Run]:
    """For each rank its heads; with more ranks than heads some have none."""
    return [even_run(heads, rank, sp) for rank in range(sp)]


def everywhere(size: int, sp: int) -> list[Run]:
    """Every rank needs all."""
    return [(0, size)] * sp


def of_groups(heads: int, groups: int, sp: int) -> list[Run]:
    """For each rank the groups that its heads use: `heads / groups` consecutive heads share one."""
    return [used_by(run, heads, groups) for run in own(heads, sp)]


def expanded(x: Tensor, heads: int, groups: int, group: ProcessGroup) -> Tensor:
    """This rank's groups, [batch, seq_len, groups, ...], one for each of its heads where they are cut unevenly."""
    sp, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    return for_each_head(x, 2, even_run(heads, rank, sp), heads, groups)


def _with(shape: torch.Size, dim: int, size: int) -> torch.Size:
    return torch.Size((*shape[:dim], size, *shape[dim + 1 :]))


class _ToHeads(torch.autograd.Function):
    """Tensors of one type, [batch, tokens, heads, ...] of a slice, to this rank's heads of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, runs: list[list[Run]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.runs, ctx.shapes = group, runs, [x.shape for x in tensors]
        sp, me = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        parts = [[x[:, :, slice(*run[r])] for x, run in zip(tensors, runs, strict=True)] for r in range(sp)]
        mine = [_with(x.shape, 2, run[me][1] - run[me][0]) for x, run in zip(tensors, runs, strict=True)]
        got = exchange_parts(tensors[0], parts, [mine] * sp, group)
        return tuple(torch.cat(pieces, 1) for pieces in zip(*got, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sp, tokens = torch.distributed.get_world_size(ctx.group), ctx.shapes[0][1]
        parts = [[g[:, s * tokens : (s + 1) * tokens] for g in grads] for s in range(sp)]
        shapes = [
            [_with(shape, 2, run[r][1] - run[r][0]) for shape, run in zip(ctx.shapes, ctx.runs, strict=True)]
            for r in range(sp)
        ]
        got = exchange_parts(grads[0], parts, shapes, ctx.group)
        out = []
        for i, (shape, run) in enumerate(zip(ctx.shapes, ctx.runs, strict=True)):
            gradient = grads[i].new_zeros(shape)
            for r in range(sp):
                gradient[:, :, slice(*run[r])] += got[r][i]
            out.append(gradient)
        return (None, None, *out)


class _ToTokens(torch.autograd.Function):
    """[batch, seq_len, heads of this rank, ...] to all heads of this rank's slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, runs: list[Run]) -> Tensor:
        ctx.group, ctx.runs = group, runs
        sp = torch.distributed.get_world_size(group)
        slices = x.chunk(sp, 1)
        shapes = [[_with(slices[0].shape, 2, b - a)] for a, b in runs]
        return torch.cat([got for (got,) in exchange_parts(x, [[part] for part in slices], shapes, group)], 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        first, last = ctx.runs[torch.distributed.get_rank(ctx.group)]
        shapes = [[_with(g.shape, 2, last - first)] for _ in ctx.runs]
        got = exchange_parts(g, [[g[:, :, a:b]] for a, b in ctx.runs], shapes, ctx.group)
        return torch.cat([part for (part,) in got], 1), None, None


def to_heads(tensors: Sequence[Tensor], runs: Sequence[list[Run]], group: ProcessGroup) -> list[Tensor]:
    """From a slice of the sequence to some heads of the whole one; an all-to-all for each type of number.

    Args:
        tensors: [batch, tokens, heads, ...] each.
        runs: for each tensor and rank, what the rank gets of dimension 2.
    """
    out: list[Any] = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        which = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        done = _ToHeads.apply(group, [runs[i] for i in which], *(tensors[i] for i in which))
        for i, x in zip(which, done, strict=True):
            out[i] = x
    return out


def to_tokens(x: Tensor, runs: list[Run], group: ProcessGroup) -> Tensor:
    """The way back: [batch, seq_len, own heads, ...] -> [batch, tokens, heads, ...]."""
    out: Tensor = _ToTokens.apply(x, group, runs)
    return out


def _reach(source: int, target: int, tokens: int, columns: int) -> slice:
    """Of `source`'s slice, what lies in the `columns` columns before `target`'s."""
    begin, end = target * tokens - columns, target * tokens
    first = source * tokens
    return slice(min(max(begin - first, 0), tokens), min(max(end - first, 0), tokens))


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.columns, ctx.shape = group, columns, x.shape
        sp, me, tokens = torch.distributed.get_world_size(group), torch.distributed.get_rank(group), x.shape[-1]
        reach = [_reach(source, me, tokens, columns) for source in range(sp)]
        parts = [[x[..., _reach(me, target, tokens, columns)]] for target in range(sp)]
        shapes = [[torch.Size((*x.shape[:-1], s.stop - s.start))] for s in reach]
        found = torch.cat([part for (part,) in exchange_parts(x, parts, shapes, group)], -1)
        return torch.nn.functional.pad(found, (columns - found.shape[-1], 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        sp, me, tokens = (
            torch.distributed.get_world_size(ctx.group),
            torch.distributed.get_rank(ctx.group),
            ctx.shape[-1],
        )
        widths = [s.stop - s.start for s in (_reach(source, me, tokens, ctx.columns) for source in range(sp))]
        known = g[..., ctx.columns - sum(widths) :]
        reach = [_reach(me, target, tokens, ctx.columns) for target in range(sp)]
        shapes = [[torch.Size((*ctx.shape[:-1], s.stop - s.start))] for s in reach]
        got = exchange_parts(g, [[part] for part in known.split(widths, -1)], shapes, ctx.group)
        out = g.new_zeros(ctx.shape)
        for place, (part,) in zip(reach, got, strict=True):
            out[..., place] += part
        return out, None, None


def halo(x: Tensor, columns: int, group: ProcessGroup) -> Tensor:
    """The `columns` columns of the sequence before this rank's slice [..., tokens]; zeros before its beginning."""
    out: Tensor = _Halo.apply(x, columns, group)
    return out

"""Attention whose scores are changed before the softmax, in blocks of queries that the backward computes again.

In plain torch, for any device: the flash kernels of CPU have no place for a soft cap. Scores exist for one block of
queries at a time, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels.pieces import Piece, Rows, blocks, by_rows, seen

_BLOCK = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    rows: tuple[Rows, ...],
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `kernels.cpu.attention`; scores pass through softcap x tanh(scores / softcap) (Gemma 2, arXiv 2408.00118)."""
    parts = [
        (which, piece)
        for which, row in by_rows(documents.rows, documents.batch, documents.seq_len)
        for piece in blocks(row, rows, window, _BLOCK)
    ]
    out: Tensor = _Attention.apply(query, key, value, sinks, parts, (window, scaling, softcap))
    return out


def _block(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, visible: Tensor, scaling: float, cap: float | None
) -> Tensor:
    """[batch, heads, queries, dim] against [batch, KV heads, keys, dim] each; a group of heads shares its keys."""
    groups = query.shape[1] // key.shape[1]
    shared = query.unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (shared @ key.transpose(-1, -2)).float() * scaling
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.unflatten(2, (groups, -1)).masked_fill(~visible, -torch.inf)  # [batch, KV, groups, queries, keys]
    if sinks is not None:
        column = sinks.float().view(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.flatten(2, 3) @ value).unflatten(2, (groups, -1)).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        parts: list[tuple[slice, Piece]],
        scores: tuple[int | None, float, float | None],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.parts, ctx.scores = parts, scores
        window, *change = scores
        batch, heads, tokens, _ = query.shape
        out = value.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for which, piece in parts:
            q, k, v = query[which, :, piece.queries], key[which, :, piece.keys], value[which, :, piece.keys]
            out[which, :, piece.queries] = _block(q, k, v, sinks, seen(piece, window, query.device), *change)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sinks = ctx.saved_tensors
        window, *change = ctx.scores
        totals = [torch.zeros_like(x) for x in tensors]
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for which, piece in ctx.parts:
            places = (piece.queries, piece.keys, piece.keys)
            leaves = [x[which, :, p].detach().requires_grad_() for x, p in zip(tensors, places, strict=True)]
            column = None if sinks is None else sinks.detach().requires_grad_()
            with torch.enable_grad():
                out = _block(*leaves, column, seen(piece, window, leaves[0].device), *change)
            wanted = leaves if column is None else [*leaves, column]
            found = torch.autograd.grad(out, wanted, grads[0][which, :, piece.queries])
            for total, place, part in zip(totals, places, found[:3], strict=True):
                total[which, :, place] += part
            if of_sinks is not None:
                of_sinks += found[3]
        return *totals, None if of_sinks is None else of_sinks.to(sinks.dtype), None, None

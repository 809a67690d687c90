"""Attention whose scores are changed before the softmax, in blocks of queries that the backward computes again.

In plain torch, for any device: the flash kernels of CPU have no place for a soft cap. Scores exist for one block of
queries at a time, forward and backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels.pieces import Piece, Rows, blocks, by_rows, seen
from ulysses_exp.model.attention.kernels.scores import Scores

_BLOCK = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    rows: tuple[Rows, ...],
    scores: Scores,
) -> Tensor:
    """As `kernels.cpu.attention`, with a soft cap."""
    parts = [
        (which, piece)
        for which, row in by_rows(documents.rows, documents.batch, documents.seq_len)
        for piece in blocks(row, rows, scores.window, _BLOCK)
    ]
    out: Tensor = _Attention.apply(query, key, value, scores.sinks, parts, replace(scores, sinks=None))
    return out


def _block(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, visible: Tensor, scores: Scores) -> Tensor:
    """[batch, heads, queries, dim] against [batch, KV heads, keys, dim] each; a group of heads shares its keys."""
    groups = query.shape[1] // key.shape[1]
    shared = query.unflatten(1, (-1, groups)).flatten(2, 3)
    found = (shared @ key.transpose(-1, -2)).float() * scores.scale(query)
    if scores.softcap is not None:
        found = torch.tanh(found / scores.softcap) * scores.softcap
    found = found.unflatten(2, (groups, -1)).masked_fill(~visible, -torch.inf)  # [batch, KV, groups, queries, keys]
    if sinks is not None:
        column = sinks.float().view(1, -1, groups, 1, 1).expand(*found.shape[:-1], 1)
        found = torch.cat([found, column], dim=-1)
    weights = found.softmax(-1)[..., : key.shape[2]].to(value.dtype)
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
        scores: Scores,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.parts, ctx.scores = parts, scores
        batch, heads, tokens, _ = query.shape
        out = value.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for which, piece in parts:
            q, k, v = query[which, :, piece.queries], key[which, :, piece.keys], value[which, :, piece.keys]
            out[which, :, piece.queries] = _block(q, k, v, sinks, seen(piece, scores.window, query.device), scores)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sinks = ctx.saved_tensors
        scores: Scores = ctx.scores
        totals = [torch.zeros_like(x) for x in tensors]
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for which, piece in ctx.parts:
            places = (piece.queries, piece.keys, piece.keys)
            leaves = [x[which, :, p].detach().requires_grad_() for x, p in zip(tensors, places, strict=True)]
            column = None if sinks is None else sinks.detach().requires_grad_()
            with torch.enable_grad():
                visible = seen(piece, scores.window, leaves[0].device)
                out = _block(leaves[0], leaves[1], leaves[2], column, visible, scores)
            wanted = leaves if column is None else [*leaves, column]
            found = torch.autograd.grad(out, wanted, grads[0][which, :, piece.queries])
            for total, place, part in zip(totals, places, found[:3], strict=True):
                total[which, :, place] += part
            if of_sinks is not None:
                of_sinks += found[3]
        return *totals, None if of_sinks is None else of_sinks.to(sinks.dtype), None, None

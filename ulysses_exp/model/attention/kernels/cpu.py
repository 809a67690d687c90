"""Attention on CPU by torch's flash kernel, whose log-sum-exp joins what its calls found.

A query may see several runs of keys, and a sink: each call returns the log-sum-exp of its scores, and outputs are
weighted by them. Given the output and the log-sum-exp of the whole row, the kernel's backward takes the probabilities
of any part of it (FlashAttention-2, arXiv 2307.08691, section 2.3.2), so gradients of parts add up; that of a sink is
its probability times the row's dO x O.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels import cpu_blocks
from ulysses_exp.model.attention.kernels.pieces import Piece, Rows, by_rows, pieces, seen
from ulysses_exp.model.attention.kernels.scores import Scores

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    rows: tuple[Rows, ...],
    scores: Scores,
) -> Tensor:
    """Causal attention within documents, exact.

    Args:
        query: [batch, heads, the tokens of `rows`, head_dim].
        key, value: [batch, KV heads, seq_len, head_dim]; values may be of another width. KV heads divide query heads.
        rows: the places of the queries, in their order.
        scores: without a soft cap.

    Returns:
        [batch, heads, tokens, dim of a value], laid out [batch, tokens, heads, dim]; zero at padding.
    """
    width, scaling = value.shape[-1], scores.scale(query)
    if width < query.shape[-1]:  # the kernel takes one width; zeros add nothing to scores and are cut off again
        value = F.pad(value, (0, query.shape[-1] - width))
    elif width > query.shape[-1]:
        query, key = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out: Tensor = _Attention.apply(
        query, key, value, scores.sinks, _Calls(query.shape[1] // key.shape[1], documents, rows, scores.window, scaling)
    )
    return out[..., :width]


class _Calls:
    """The calls of the kernel for one attention."""

    def __init__(self, groups: int, documents: Documents, rows: tuple[Rows, ...], window: int | None, scaling: float):
        self.groups, self.window, self.scaling = groups, window, scaling
        self.parts = [
            (batch, piece)
            for batch, row in by_rows(documents.rows, documents.batch, documents.seq_len)
            for piece in pieces(row, rows, window)
        ]
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def mask(self, piece: Piece, dtype: torch.dtype) -> Tensor | None:
        if piece.ahead is None:
            return None
        sizes = (piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start, piece.ahead)
        if sizes not in self._masks:
            visible = seen(piece, self.window, torch.device("cpu"))
            self._masks[sizes] = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        return self._masks[sizes]

    def keys(self, tensors: list[Tensor], batch: slice, piece: Piece) -> list[Tensor]:
        """The keys of a piece, a KV head for each query head."""
        parts = [x[batch, :, piece.keys] for x in tensors]
        return parts if self.groups == 1 else [x.repeat_interleave(self.groups, 1) for x in parts]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        calls: _Calls,
    ) -> Tensor:
        batch, heads, tokens, dim = query.shape
        out = query.new_zeros(batch, tokens, heads, dim).transpose(1, 2)
        lse = query.new_zeros(batch, tokens, heads, dtype=torch.float32).transpose(1, 2)
        for which, piece in calls.parts:
            queries = query[which, :, piece.queries]
            found, total = _forward(
                queries,
                *calls.keys([key, value], which, piece),
                0.0,
                piece.causal,
                attn_mask=calls.mask(piece, query.dtype),
                scale=calls.scaling,
            )
            o, s = out[which, :, piece.queries], lse[which, :, piece.queries]
            if piece.again:
                both = torch.logaddexp(s, total)
                found = o * (s - both).exp()[..., None] + found * (total - both).exp()[..., None]
                total = both
            o.copy_(found)
            s.copy_(total)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.float()[None, :, None])
            out.mul_((lse - total).exp()[..., None])
            lse = total.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.calls = calls
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        calls: _Calls = ctx.calls
        grad = grads[0]
        dq, dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
                      for x in (query, key, value))  # fmt: skip
        for which, piece in calls.parts:
            by_query = tuple(x[which, :, piece.queries] for x in (grad, query, out, lse))
            by_key = calls.keys([key, value], which, piece)
            if piece.causal and cpu_blocks.helps(by_query[1]):
                found = tuple(cpu_blocks.gradients(by_query, tuple(by_key), calls.scaling))
            else:
                mask = calls.mask(piece, query.dtype)
                found = _backward(
                    *by_query[:2], *by_key, *by_query[2:], 0.0, piece.causal, attn_mask=mask, scale=calls.scaling
                )
            if calls.groups > 1:
                found = (found[0], *(x.unflatten(1, (-1, calls.groups)).sum(2) for x in found[1:]))
            for total, place, part in zip((dq, dk, dv), (piece.queries, piece.keys, piece.keys), found, strict=True):
                total[which, :, place] += part
        ds = None
        if sinks is not None:
            probability = (sinks.float()[None, :, None] - lse).exp()
            ds = -(probability * (grad.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, ds, None

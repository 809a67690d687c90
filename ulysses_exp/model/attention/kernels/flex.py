"""Attention by torch's flex_attention, compiled: documents, windows, soft caps and sinks in one kernel, on a GPU.

On CPU it has no backward (torch 2.13) and is not compiled here: there it serves as a check of the masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels.pieces import Rows
from ulysses_exp.model.attention.kernels.scores import Scores


def block_mask(documents: Documents, rows: tuple[Rows, ...], window: int | None, device: torch.device) -> Any:
    """The BlockMask of the documents; make it once a step, not once a layer."""
    segment = None if documents.plain else documents.table(device)
    places = None if rows == ((0, documents.seq_len),) else torch.cat([torch.arange(a, b) for a, b in rows]).to(device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = q if places is None else places[q]
        seen = k <= row
        if window is not None:
            seen = seen & (k > row - window)
        if segment is not None:
            seen = seen & (segment[b, row] == segment[b, k])
        return seen

    batch = None if segment is None else documents.batch
    queries = sum(b - a for a, b in rows)
    return create_block_mask(visible, B=batch, H=None, Q_LEN=queries, KV_LEN=documents.seq_len, device=str(device))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores) -> Tensor:
    """[batch, heads, tokens, dim] each -> [batch, tokens, heads, dim of a value].

    A sink takes its part of each query's weight: out x sigmoid(lse - sink), as softmax with one more column.

    Raises:
        ValueError: a backward is wanted on CPU.
    """
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("sp.attention=flex_attention has no backward on CPU; set sp.attention=sdpa")

    run: Any = _compiled() if query.device.type == "cuda" else flex_attention
    arguments: dict[str, Any] = {
        "block_mask": mask,
        "scale": scores.scale(query),
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    if scores.softcap is not None:
        arguments["score_mod"] = _capped(scores.softcap)
    if scores.sinks is None:
        whole: Tensor = run(query, key, value, **arguments)
        return whole.transpose(1, 2)
    out, aux = run(query, key, value, **arguments, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(aux.lse - scores.sinks.float()[None, :, None])
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return change


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)

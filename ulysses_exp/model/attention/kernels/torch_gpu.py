"""Attention by torch's own kernels on an accelerator: nothing to install.

Plain sequences by `scaled_dot_product_attention`; documents and windows by `varlen_attn` (torch 2.13, FlashAttention of
several sequences in one call, bf16 and fp16), which takes where they begin from the host. Where that cannot be, fp32
among others, document by document, and windows in blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_exp.model.attention.documents import Documents, Row
from ulysses_exp.model.attention.kernels.pieces import by_rows
from ulysses_exp.model.attention.kernels.scores import Scores


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float = 0.0) -> Tensor:
    """One document: [batch, heads, tokens, dim] each -> [batch, tokens, heads, dim]."""
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def takes_documents(query: Tensor, value: Tensor) -> bool:
    """Whether `of_documents` has a kernel for these."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
    )


def of_documents(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scores: Scores) -> Tensor:
    """All documents of a batch at once, also within a window: `varlen_attn`. Padding is a document of its own.

    Args:
        begins: int32 [documents + 1] on the device, where documents begin in the rows laid end to end, and the end.
        longest: tokens of the longest document.

    Returns:
        [batch, seq_len, heads, head_dim].
    """
    from torch.nn.attention.varlen import varlen_attn

    batch = query.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q, k, v, begins, begins, longest, longest, scale=scores.scaling,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, -1))


def one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Document by document: [batch, seq_len, heads, dim]; zero at padding."""
    window, scaling = scores.window, scores.scaling

    def of_row(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        # split, not sliced: the gradient of a slice is a tensor of the whole length, of a split one for all its parts
        sizes = [s.stop - s.start for s in row]
        parts = []
        for segment, *part in zip(row, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
            own_q, own_k, own_v = part
            if segment.padding:
                batch, heads, tokens, _ = own_q.shape
                parts.append(q.new_zeros(batch, tokens, heads, v.shape[-1]))
            elif window is not None and own_q.shape[2] > window:
                parts.append(_windowed(own_q, own_k, own_v, window, scaling))
            else:
                parts.append(causal(own_q, own_k, own_v, scaling))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    rows = by_rows(documents.rows, documents.batch, documents.seq_len)
    if len(rows) == 1:
        return of_row(query, key, value, rows[0][1])
    return torch.cat([of_row(query[which], key[which], value[which], row) for which, row in rows])


def _windowed(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float | None) -> Tensor:
    """Sliding-window attention in blocks of queries, each against the window before it: linear in the length.

    The first `window` tokens are plain causal. Every later block of b queries sees window + b keys through one and the
    same [b, window + b] mask, so all blocks are one call.
    """
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    block = min(max(window, 64), 256, tokens - window)
    blocks, rest = divmod(tokens - window, block)
    r = torch.arange(block, device=query.device)[:, None]
    j = torch.arange(window + block, device=query.device)
    mask = ((j > r) & (j <= r + window)).repeat(groups, 1)  # query r of a block stands at key j = r + window

    def banded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """[n, heads, b, dim] against [n, KV heads, window + b, dim] -> [n, b, heads, dim]; a group shares its keys."""
        b = q.shape[2]
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.unflatten(2, (groups, b)).flatten(1, 2).transpose(1, 2)

    rows = []
    for b in range(query.shape[0]):  # a batch dimension over blocks and rows would copy the overlapping keys
        q, k, v = query[b], key[b], value[b]
        last = window + blocks * block
        q_blocks = q[:, window:last].unflatten(1, (blocks, block)).transpose(0, 1)
        k_blocks, v_blocks = (
            x[:, :last].unfold(1, window + block, block).permute(1, 0, 3, 2) for x in (k, v)
        )  # overlapping views: [blocks, KV heads, window + block, dim]
        parts = [
            causal(q[None, :, :window], k[None, :, :window], v[None, :, :window], scaling)[0],
            banded(q_blocks, k_blocks, v_blocks, mask).flatten(0, 1),
        ]
        if rest:
            tail = mask.unflatten(0, (groups, block))[:, :rest, : window + rest].flatten(0, 1)
            keys = slice(last - window, None)
            parts.append(banded(q[None, :, last:], k[None, :, keys], v[None, :, keys], tail)[0])
        rows.append(torch.cat(parts))
    return torch.stack(rows)

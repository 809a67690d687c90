"""Core attention over whole sequences: causal within documents, within a sliding window, never with an n^2 mask.

Upstream's wrapper (DeepSpeed 0.19.8) hands the core attention no mask at all: under `sdpa` packed documents see each
other and sliding windows are ignored, under `flex_attention` the mask is rebuilt as plain causal (docs/findings.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_exp.model.attention import cpu_causal
from ulysses_exp.model.attention.documents import Documents, Row

Core = Callable[..., tuple[Tensor, Any]]


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`scaled_dot_product_attention` document by document.

    Args:
        query, key, value: [batch, heads, seq_len, head_dim]; KV heads divide query heads.
        window: a token sees itself and the `window` - 1 tokens before it; None: all before it.
        scaling: on the scores; None: 1 / sqrt(head_dim).

    Returns:
        [batch, seq_len, heads, head_dim]; zero at padding.
    """

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if window is not None and q.shape[2] > window:
            return _windowed(q, k, v, window, scaling, dropout)
        return _causal(q, k, v, scaling, dropout)

    def row(q: Tensor, k: Tensor, v: Tensor, segments: Row) -> Tensor:
        # split, not sliced: the gradient of a slice is a tensor of the whole length, of a split one for all its parts
        sizes = [s.stop - s.start for s in segments]
        parts = []
        for s, *part in zip(segments, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
            if s.padding:
                batch, heads, _, _ = q.shape
                parts.append(q.new_zeros(batch, s.stop - s.start, heads, v.shape[-1]))
            else:
                parts.append(causal(*part))
        return torch.cat(parts, dim=1)

    if documents.rows is None:
        return causal(query, key, value)
    if len(set(documents.rows)) == 1:
        return row(query, key, value, documents.rows[0])
    rows = [row(query[b : b + 1], key[b : b + 1], value[b : b + 1], r) for b, r in enumerate(documents.rows)]
    return torch.cat(rows)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    """[batch, heads, tokens, dim] each -> [batch, tokens, heads, dim]."""
    if not dropout and cpu_causal.helps(query, key, value):
        return cpu_causal.causal(query, key, value, scaling).transpose(1, 2)
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _windowed(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float | None, dropout: float) -> Tensor:
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
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
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
            _causal(q[None, :, :window], k[None, :, :window], v[None, :, :window], scaling, dropout)[0],
            banded(q_blocks, k_blocks, v_blocks, mask).flatten(0, 1),
        ]
        if rest:
            tail = mask.unflatten(0, (groups, block))[:, :rest, : window + rest].flatten(0, 1)
            keys = slice(last - window, None)
            parts.append(banded(q[None, :, last:], k[None, :, keys], v[None, :, keys], tail)[0])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def flex_mask(documents: Documents, window: int | None, device: torch.device) -> Any:
    """The BlockMask of the documents, for `flex_attention`; make it once a step, not once a layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment = None if documents.plain else documents.table(device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        if window is not None:
            seen = seen & (k > q - window)
        if segment is not None:
            seen = seen & (segment[b, q] == segment[b, k])
        return seen

    n = documents.seq_len
    batch = None if segment is None else documents.batch
    return create_block_mask(visible, B=batch, H=None, Q_LEN=n, KV_LEN=n, device=str(device))


class Plan:
    """The documents of one forward, and what is made of them once and used in every layer."""

    def __init__(self, whole: Documents):
        self.documents = whole
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def around(attention: str, original: Callable[..., Any]) -> Core:
    """What runs between the two exchanges: `original`'s attention, with the documents of the forward respected."""

    def run(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        plan: Plan,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        whole, device = plan.documents, query.device
        window = None if sliding_window is None or sliding_window >= whole.seq_len else sliding_window
        by_head = [k for k in ("s_aux", "position_bias") if kwargs.get(k) is not None]
        if by_head:
            raise ValueError(f"{', '.join(by_head)} (of every head) is not split over ranks; set sp.size=1")
        if attention == "sdpa":
            if kwargs.get("softcap") is not None:
                raise ValueError("sp.attention=sdpa has no softcap; set sp.attention=flex_attention (on a GPU)")
            out = sdpa(query, key, value, whole, window=window, scaling=scaling, dropout=dropout)
            return out, None
        if attention == "flex_attention":
            if device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
                raise ValueError("sp.attention=flex_attention has no backward on CPU; set sp.attention=sdpa")
            mask = plan.once(("flex", window, device), lambda: flex_mask(whole, window, device))
            return original(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        batch = query.shape[0]
        # transformers' flash attention finds documents in position_ids, and only in a batch of one row; padding is a
        # document of its own there
        positions = plan.once(("flash", device), lambda: whole.positions(device))
        if whole.plain or batch == 1:
            return original(module, query, key, value, None, position_ids=positions, **kwargs)
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        out, weights = original(module, query, key, value, None, position_ids=positions.flatten()[None], **kwargs)
        return out.unflatten(1, (batch, -1))[0], weights

    return run

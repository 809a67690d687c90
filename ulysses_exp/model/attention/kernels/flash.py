"""Attention by a flash kernel that transformers knows: FlashAttention 2, 3, 4, or one of a hub.

transformers finds documents in position ids, which costs a device sync and a copy of q, k and v in every layer. Where
they begin is known on the host: handed over as `cu_seq_lens_q` and `max_length_q`, nothing is looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ulysses_exp.model.attention.documents import Documents


def begins(documents: Documents, device: torch.device) -> tuple[Tensor, int]:
    """int32 [documents + 1], where documents begin in the rows laid end to end; tokens of the longest. No sync."""
    edges, longest = [0], 0
    if documents.rows is None:
        edges += [documents.seq_len * (b + 1) for b in range(documents.batch)]
        longest = documents.seq_len
    for b, row in enumerate(documents.rows or ()):
        edges += [b * documents.seq_len + segment.stop for segment in row]
        longest = max(longest, *(segment.stop - segment.start for segment in row))
    found = torch.tensor(edges, dtype=torch.int32)
    return (found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found), longest


def attention(
    original: Callable[..., tuple[Tensor, Any]],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cuts: tuple[Tensor, int] | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What transformers' function `original` makes of whole sequences: [batch, seq_len, heads, head_dim].

    Args:
        cuts: of `begins`; None where every row is one document.
    """
    if cuts is None:
        return original(module, query, key, value, None, **kwargs)
    batch = query.shape[0]
    # one row: transformers hands lengths on as they are, and takes the first dimension for that of sequences
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    where, longest = cuts
    out, weights = original(
        module, query, key, value, None, **kwargs,
        cu_seq_lens_q=where, cu_seq_lens_k=where, max_length_q=longest, max_length_k=longest,
    )  # fmt: skip
    return out.unflatten(1, (batch, -1))[0], weights

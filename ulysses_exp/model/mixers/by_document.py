"""A scan over packed or padded sequences, a document at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ulysses_exp.model.attention.documents import Documents, Segment

_STEP = 64  # documents of like length share a call; scans work in chunks of about this size


def by_document(scan: Callable[..., Tensor], tensors: Sequence[Tensor], whole: Documents) -> Tensor:
    """`scan` with a fresh state at the beginning of every document.

    Documents become the rows of batches, filled up on the right by fewer tokens than `_STEP`: what follows a document
    changes nothing in it, for a scan looks back only. So there are as many calls as lengths, not as documents.

    Args:
        scan: causal, of tensors [rows, tokens, ...] that are alike in both sizes; rows do not see each other.
        tensors: [batch, seq_len, ...] each.

    Returns:
        [batch, seq_len, ...], zero at padding.
    """
    if whole.rows is None:
        return scan(*tensors)
    alike: dict[int, list[tuple[int, Segment]]] = {}
    for b, row in enumerate(whole.rows):
        for segment in row:
            if not segment.padding:
                alike.setdefault(-(-(segment.stop - segment.start) // _STEP), []).append((b, segment))
    if not alike:  # nothing but padding, of which nothing is asked
        return scan(*tensors)
    found: dict[tuple[int, int], Tensor] = {}
    for members in alike.values():
        rows = [pad_sequence([x[b, s.start : s.stop] for b, s in members], batch_first=True) for x in tensors]
        out = scan(*rows)
        found |= {(b, s.start): y[: s.stop - s.start] for (b, s), y in zip(members, out, strict=True)}
    some = next(iter(found.values()))

    def of(b: int, s: Segment) -> Tensor:
        return some.new_zeros(s.stop - s.start, *some.shape[1:]) if s.padding else found[b, s.start]

    return torch.stack([torch.cat([of(b, s) for s in row]) for b, row in enumerate(whole.rows)])

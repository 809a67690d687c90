"""Packed sequences cost what their tokens cost, however many documents there are."""

from __future__ import annotations

import time

import torch

from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.documents import Documents, Segment

TOKENS = 32_768


def seconds(documents: int) -> float:
    """Of a backward pass in bf16 over that many documents of equal length; the best of three."""
    size = TOKENS // documents
    row = tuple(Segment(start, start + size) for start in range(0, TOKENS, size))
    found = []
    for _ in range(3):
        q, k, v = (torch.randn(1, heads, TOKENS, 32, dtype=torch.bfloat16, requires_grad=True) for heads in (2, 1, 1))
        out = core.torchs(q, k, v, core.Plan(Documents(1, TOKENS, (row,))), core.Scores())
        began = time.perf_counter()
        out.sum().backward()
        found.append(time.perf_counter() - began)
    return min(found)


def test_backward_does_not_grow_with_the_number_of_documents():
    """Each document's gradient as a tensor of the whole length took 27 s here at 1,024 documents."""
    torch.set_num_threads(1)
    assert seconds(1024) < 1.5 * seconds(16)

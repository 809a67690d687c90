"""The core attention against one explicit mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ulysses_exp.attention import core
from ulysses_exp.attention.documents import Documents, Segment


def dense(query, key, value, whole: Documents, window: int | None):
    n, device = whole.seq_len, query.device
    q, k = torch.arange(n)[:, None], torch.arange(n)
    seen = (k <= q) & (k > q - (window or n))
    segment = whole.table(device)
    seen = seen & (segment[:, :, None] == segment[:, None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=0.3).transpose(1, 2)


DOCUMENTS = {
    "plain": None,
    "same rows": ((Segment(0, 500), Segment(500, 777)),) * 2,
    "other rows": ((Segment(0, 20), Segment(20, 777)), (Segment(0, 300, padding=True), Segment(300, 777))),
}


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 1, 7, 100, 300])  # blocks smaller, equal to and larger than the rest
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_and_gradients_are_those_of_a_dense_mask(rows, window, kv_heads) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 777, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    real = torch.ones(2, 777, 1, 1)
    for row, segments in enumerate(rows or ()):
        for s in segments:
            real[row, s.start : s.stop] = not s.padding
    expected = dense(*inputs, whole, window) * real
    found = core.sdpa(*inputs, whole, window=window, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert (ours - theirs).norm() <= 2e-6 * (1 + theirs.norm())  # a window of 1 has no gradient in q and k


def test_memory_of_a_window_is_linear_in_the_length() -> None:
    """An n x n mask of these 16,384 tokens alone has 256 MiB."""
    q, k, v = (torch.randn(1, 1, 16384, 8) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        core.sdpa(q, k, v, Documents(1, 16384), window=128)
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) < 2**24

"""The core attention against one explicit mask."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.documents import Documents, Segment


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


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
def test_the_block_mask_of_flex_attention_says_the_same(rows, window) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 777, 8) for heads in (4, 2, 2))
    mask = core.flex_mask(whole, window, query.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not compiled: the mask is what is tested
        found = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, dense(query, key, value, whole, window), rtol=0, atol=2e-6)


def by_position_ids(module, query, key, value, mask, *, position_ids, sliding_window=None, scaling, **kwargs):
    """The contract of transformers' flash attention, densely: documents from position_ids, in one row only."""
    assert mask is None
    batch, n = position_ids.shape
    starts = (position_ids[0] == 0).nonzero().flatten().tolist() if batch == 1 else [0]
    row = tuple(Segment(a, b) for a, b in itertools.pairwise([*starts, n]))
    return dense(query, key, value, Documents(batch, n, (row,) * batch), sliding_window), None


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_gets_documents_as_positions_of_one_row(rows, window) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 777, 8) for heads in (4, 2, 2))
    run = core.around("flash_attention_2", by_position_ids)
    found, _ = run(None, query, key, value, None, plan=core.Plan(whole), scaling=0.3, sliding_window=window)
    torch.testing.assert_close(found, dense(query, key, value, whole, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_sdpa_has_not_is_refused(name: str) -> None:
    query = torch.randn(1, 2, 8, 8)
    run = core.around("sdpa", F.scaled_dot_product_attention)
    with pytest.raises(ValueError, match=name):
        run(None, query, query, query, None, plan=core.Plan(Documents(1, 8)), **{name: 1.0})

"""The core attention against one explicit mask."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from ulysses_exp.config.head_shares import HeadShares
from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.documents import Documents, Segment
from ulysses_exp.model.attention.kernels import torch_gpu


def dense(query, key, value, whole: Documents, window=None, softcap=None, sinks=None, rows=None, scaling=0.3):
    """[batch, the queries of `rows`, heads, dim of a value], by a softmax over all keys."""
    n = whole.seq_len
    q, k = torch.arange(n)[:, None], torch.arange(n)
    seen = (k <= q) & (k > q - (window or n))
    segment = whole.table(query.device)
    seen = seen & (segment[:, :, None] == segment[:, None, :])
    if rows is not None:
        seen = torch.cat([seen[:, a:b] for a, b in rows], dim=1)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., :n] @ value).transpose(1, 2)


DOCUMENTS = {
    "plain": None,
    "same rows": ((Segment(0, 500), Segment(500, 777)),) * 2,
    "other rows": ((Segment(0, 20), Segment(20, 777)), (Segment(0, 300, padding=True), Segment(300, 777))),
}


def real(rows) -> torch.Tensor:
    """[2, 777, 1, 1]: zero at padding."""
    found = torch.ones(2, 777, 1, 1)
    for row, segments in enumerate(rows or ()):
        for s in segments:
            found[row, s.start : s.stop] = not s.padding
    return found


def same(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    """Outputs and gradients of everything in `inputs`."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert (ours - theirs).norm() <= tolerance * (10 + theirs.norm())  # a window of 1 has no gradient in q and k


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 1, 7, 100, 300])  # blocks smaller, equal to and larger than the rest
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_and_gradients_are_those_of_a_dense_mask(rows, window, kv_heads) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 777, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    found = core.torchs(*inputs, core.Plan(whole), core.Scores(0.3, window))
    same(found, dense(*inputs, whole, window) * real(rows), inputs)
    # what an accelerator falls back to, in fp32
    on_gpu = torch_gpu.one_by_one(*inputs, whole, core.Scores(0.3, window))
    same(on_gpu, dense(*inputs, whole, window) * real(rows), inputs)


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])  # saturates: most scores are beyond
@pytest.mark.parametrize("sinks", [False, True])
def test_sinks_and_soft_caps(rows, window, softcap, sinks) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 777, 8, requires_grad=True) for heads in (4, 2, 2)]
    column = (2 * torch.randn(4)).requires_grad_() if sinks else None
    leaves = inputs if column is None else [*inputs, column]
    expected = dense(*inputs, whole, window, softcap, column) * real(rows)
    found = core.torchs(*inputs, core.Plan(whole), core.Scores(0.3, window, softcap, column))
    same(found, expected, leaves, 4e-6)
    if softcap or sinks:
        ignored = core.torchs(*inputs, core.Plan(whole), core.Scores(0.3, window))
        assert (ignored - expected).abs().max() > 0.1


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_queries_of_some_places_against_all_keys(rows, window, softcap) -> None:
    """As with more ranks than heads: 2 heads on 6 ranks."""
    whole, shares = Documents(2, 777, rows), HeadShares(6, 2)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 777, 8, requires_grad=True) for _ in range(3))
    places = []
    for rank in range(0, 6, shares.u):
        runs = shares.rows(rank, 777)
        places += [p for a, b in runs for p in range(a, b)]
        part = torch.cat([query[:, :, a:b] for a, b in runs], dim=2)
        found = core.torchs(part, key, value, core.Plan(whole), core.Scores(0.3, window, softcap), runs)
        padding = torch.cat([real(rows)[:, a:b] for a, b in runs], dim=1)
        expected = dense(part, key, value, whole, window, softcap, rows=runs) * padding
        same(found, expected, [query, key, value], 4e-6)
    assert sorted(places) == list(range(777))


@pytest.mark.parametrize("widths", [(12, 8), (8, 12)])
def test_values_of_another_width_than_keys(widths) -> None:
    whole = Documents(2, 777, DOCUMENTS["same rows"])
    inputs = [torch.randn(2, heads, 777, width, requires_grad=True)
              for heads, width in ((4, widths[0]), (4, widths[0]), (4, widths[1]))]  # fmt: skip
    for window in (None, 100):
        found = core.torchs(*inputs, core.Plan(whole), core.Scores(0.3, window))
        same(found, dense(*inputs, whole, window), inputs)


def test_chunks_are_cut_from_the_start_of_each_document() -> None:
    rows = ((Segment(0, 5, padding=True), Segment(5, 12), Segment(12, 30)), (Segment(0, 30),))
    cut = Documents(2, 30, rows).chunked(10)
    assert [(s.start, s.stop) for s in cut.rows[0]] == [(0, 5), (5, 12), (12, 22), (22, 30)]
    assert [(s.start, s.stop) for s in cut.rows[1]] == [(0, 10), (10, 20), (20, 30)]
    plan = core.Plan(Documents(1, 30))
    assert plan.chunked(30) is plan and plan.chunked(10) is plan.chunked(10)


def test_memory_of_a_window_is_linear_in_the_length() -> None:
    """An n x n mask of these 16,384 tokens alone has 256 MiB."""
    q, k, v = (torch.randn(1, 1, 16384, 8) for _ in range(3))
    for plan, scores in (
        (core.Plan(Documents(1, 16384)), core.Scores(window=128)),
        (core.Plan(Documents(1, 16384)).chunked(128), core.Scores(softcap=1.0)),
    ):
        with torch.profiler.profile(profile_memory=True) as profile:
            core.torchs(q, k, v, plan, scores)
        held = [e.self_cpu_memory_usage for e in profile.key_averages()]
        assert sum(max(0, used) for used in held) + sum(min(0, used) for used in held) < 2**24


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("part", [None, ((100, 300), (500, 700))])
def test_flex_attention_says_the_same(rows, window, changed, part) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 777, 8) for heads in (4, 2, 2))
    if part is not None:
        query = torch.cat([query[:, :, a:b] for a, b in part], dim=2)
    more = (0.7, torch.randn(4)) if changed else (None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not compiled: the mask is what is tested
        found = core.flexible(query, key, value, core.Plan(whole), core.Scores(0.3, window, *more), part)
    torch.testing.assert_close(found, dense(query, key, value, whole, window, *more, rows=part), rtol=0, atol=2e-6)


def by_lengths(module, query, key, value, mask, *, sliding_window=None, scaling, dropout, **kwargs):
    """The contract of transformers' flash attention, densely: documents as cumulative lengths, in one row."""
    assert mask is None and "position_ids" not in kwargs
    batch, n = query.shape[0], query.shape[2]
    if not kwargs:
        return dense(query, key, value, Documents(batch, n), sliding_window), None
    edges = kwargs["cu_seq_lens_q"].tolist()
    assert batch == 1 and edges == kwargs["cu_seq_lens_k"].tolist() and edges[-1] == n
    longest = max(b - a for a, b in itertools.pairwise(edges))
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == longest and isinstance(longest, int)
    row = tuple(Segment(a, b) for a, b in itertools.pairwise(edges))
    return dense(query, key, value, Documents(1, n, (row,)), sliding_window), None


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_gets_the_lengths_of_documents_from_the_host(rows, window) -> None:
    whole = Documents(2, 777, rows)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 777, 8) for heads in (4, 2, 2))
    run = core.around("flash_attention_2", by_lengths)
    found, _ = run(None, query, key, value, None, plan=core.Plan(whole), scaling=0.3, sliding_window=window)
    torch.testing.assert_close(found, dense(query, key, value, whole, window), rtol=0, atol=2e-6)


def test_dropout_is_torchs_where_nothing_else_is_asked() -> None:
    query = torch.randn(1, 2, 8, 8)
    run = core.around("sdpa", F.scaled_dot_product_attention)
    torch.manual_seed(0)
    found, _ = run(None, query, query, query, None, plan=core.Plan(Documents(1, 8)), dropout=0.5)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(query, query, query, dropout_p=0.5, is_causal=True)
    assert torch.equal(found, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="set attention_dropout=0"):
        run(None, query, query, query, None, plan=core.Plan(Documents(1, 8)), dropout=0.5, softcap=1.0)

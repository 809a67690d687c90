"""The backward in blocks against the same attention in double precision, beside torch's own kernel."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulysses_exp.model.attention import core
from ulysses_exp.model.attention.documents import Documents
from ulysses_exp.model.attention.kernels import cpu, cpu_blocks


def inputs(batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Views as the exchange leaves them: rows are tokens, q, k and v side by side."""
    torch.manual_seed(0)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    parts = torch.randn(tokens, batch, sum(sizes)).to(dtype).split(sizes, dim=-1)
    return [p.unflatten(-1, (-1, dim)).permute(1, 2, 0, 3).detach().requires_grad_() for p in parts]


def torchs(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def ours_of(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    plan = core.Plan(Documents(query.shape[0], query.shape[2]))
    return core.torchs(query, key, value, plan, core.Scores(scaling)).transpose(1, 2)


def gradients(attention, tensors: list[Tensor], scaling: float | None) -> list[Tensor]:
    out = attention(*tensors, scaling)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), tensors))


@pytest.mark.parametrize("tokens", [512, 777, 1024])  # whole blocks, some more, a block of one
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 1, 16), (4, 2, 8), (2, 2, 64)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_gradients_are_as_exact_as_torchs(tokens, heads, kv_heads, dim, scaling) -> None:
    ours = inputs(2, heads, kv_heads, tokens, dim, torch.float32)
    assert cpu_blocks.helps(ours[0])
    assert torch.equal(ours_of(*ours, scaling), torchs(*ours, scaling))
    exact = gradients(torchs, inputs(2, heads, kv_heads, tokens, dim, torch.float64), scaling)
    for mine, theirs, true in zip(
        gradients(ours_of, ours, scaling), gradients(torchs, ours, scaling), exact, strict=True
    ):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() <= 1e-5 * true.norm()


def test_one_token_more_than_a_block_and_one_less() -> None:
    for tokens in (513, 639):
        ours = inputs(1, 2, 1, tokens, 16, torch.float32)
        for mine, theirs in zip(gradients(ours_of, ours, None), gradients(torchs, ours, None), strict=True):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_it_is_used_where_a_backward_follows_and_the_kernel_is_that_one(monkeypatch) -> None:
    ours = inputs(1, 2, 1, 512, 16, torch.float32)
    calls = []
    original = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    ours_of(*ours, None)
    assert calls == [1]
    with torch.no_grad():
        ours_of(*ours, None)
    ours_of(*(x.detach() for x in ours), None)
    ours_of(*(x.bfloat16() for x in ours), None)
    ours_of(*(x[:, :, :511] for x in ours), None)
    ours_of(*inputs(1, 2, 1, 512, 128, torch.float32), None)
    assert calls == [1]  # torch's own


def test_no_second_derivative_is_made_up() -> None:
    query, key, value = inputs(1, 1, 1, 512, 8, torch.float32)
    (gradient,) = torch.autograd.grad(ours_of(query, key, value, None).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.long  # a clock: alone on the machine
def test_it_is_still_faster_than_torchs() -> None:
    """Else torch's kernel has been mended, and this file's subject can go."""
    ours = inputs(1, 2, 1, 2048, 16, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = []
        for _ in range(15):
            times = [time.perf_counter()]
            for attention in (torchs, ours_of):
                gradients(attention, ours, None)
                times.append(time.perf_counter())
            turns.append((times[2] - times[1]) / (times[1] - times[0]))
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(turns) < 0.95

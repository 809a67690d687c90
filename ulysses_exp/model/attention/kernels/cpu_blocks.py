"""The backward of causal attention in fp32 on CPU, a block of keys at a time.

The backward of torch 2.13's CPU flash attention (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp,
`cpu_flash_attention_backward`) works on tiles of 256 queries x 512 keys, of which it holds scores and their gradients:
1 MiB, which the second-level cache of most cores cannot keep beside what is read. Given 128 keys at a time the same
kernel takes, forward and backward together, 0.77 to 0.91 of the time for heads of 16 and 0.85 to 0.97 for heads of 64,
from 512 to 16,384 tokens (benchmarks/results/attention_cpu.md). Heads of 128 gain nothing in long sequences, nor does
the forward, which has one such tile; in bf16 the kernel is another one and loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

#: Shorter sequences fit the cache as they are; of larger heads, products take the time and not the scores.
SHORTEST, LARGEST_HEAD = 512, 64


def helps(query: Tensor) -> bool:
    """Whether `gradients` takes less time than the kernel alone for a causal square of `query`."""
    return query.dtype == torch.float32 and query.shape[2] >= SHORTEST and query.shape[3] <= LARGEST_HEAD


def gradients(by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...], scaling: float | None) -> list[Tensor]:
    """Gradients of query, key and value, [batch, heads, tokens, dim] each, laid out as [batch, tokens, heads, dim].

    Tokens see their own block causally: one call for all whole blocks, as rows of a batch, and one for the rest. Then
    for each block of keys, all queries after it see all of it. The kernel takes probabilities from the log-sum-exp of
    the whole row, so gradients of parts add up.

    Args:
        by_query: gradient of the output, query, output, [batch, heads, tokens, dim] each, and the forward's
            log-sum-exp, [batch, heads, tokens].
        by_key: key and value, [batch, heads, tokens, dim].
    """
    query = by_query[1]
    batch, heads, tokens, dim = query.shape
    block = 128 if dim < 64 else 256
    blocks = tokens // block
    whole = blocks * block
    totals = [query.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3)]

    def within(part: slice, rows: int) -> None:
        """Blocks of `part` against themselves, `rows` of them at once."""
        q = [x[:, :, part].unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1) for x in by_query]
        k = [x[:, :, part].unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1) for x in by_key]
        for target, found in zip(totals, _gradients(q, k, scaling, causal=True), strict=True):
            target[:, :, part].unflatten(2, (rows, -1)).copy_(found.unflatten(0, (batch, rows)).transpose(1, 2))

    def of_later_queries(keys: slice) -> None:
        """What queries after the block `keys` see of it. What it makes is freed before the next block."""
        after = slice(keys.stop, tokens)
        found = _gradients([x[:, :, after] for x in by_query], [x[:, :, keys] for x in by_key], scaling, causal=False)
        for target, place, part in zip(totals, (after, keys, keys), found, strict=True):
            target[:, :, place] += part

    within(slice(0, whole), blocks)
    if whole < tokens:
        within(slice(whole, tokens), 1)
    for stop in range(block, tokens, block):
        of_later_queries(slice(stop - block, stop))
    return totals


def _gradients(
    by_query: list[Tensor], by_key: list[Tensor], scaling: float | None, *, causal: bool
) -> tuple[Tensor, ...]:
    grad, query, out, lse = by_query
    return _backward(grad, query, *by_key, out, lse, 0.0, causal, scale=scaling)

"""Causal attention in fp32 on CPU: torch's kernel, its backward a block of keys at a time.

The backward of torch 2.13's CPU flash attention (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp,
`cpu_flash_attention_backward`) works on tiles of 256 queries x 512 keys, of which it holds scores and their gradients:
1 MiB, which the second-level cache of most cores cannot keep beside what is read. Given 128 keys at a time the same
kernel takes, forward and backward together, 0.77 to 0.91 of the time for heads of 16 and 0.85 to 0.97 for heads of 64,
from 512 to 16,384 tokens (benchmarks/results/attention_cpu.md). Heads of 128 gain nothing in long sequences, nor does
the forward, which has one such tile; in bf16 the kernel is another one and loses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

#: Shorter sequences fit the cache as they are; of larger heads, products take the time and not the scores.
SHORTEST, LARGEST_HEAD = 512, 64


def helps(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal` takes less time than `scaled_dot_product_attention` for this forward and its backward."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[2] >= SHORTEST
        and query.shape[3] <= LARGEST_HEAD
        and query.shape[3] == value.shape[3]  # else torch has no flash kernel
        and all(x.stride(3) == 1 for x in (query, key, value))
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """`scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`: the same output bit for bit, gradients to
    rounding.

    Args:
        query, key, value: [batch, heads, tokens, head_dim] fp32 on CPU; KV heads divide query heads.
        scaling: on the scores; None: 1 / sqrt(head_dim).

    Returns:
        [batch, heads, tokens, head_dim].
    """
    return _Causal.apply(query, key, value, scaling)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        out, lse = _forward(query, _shared(key, groups), _shared(value, groups), 0.0, True, scale=scaling)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        by_query = (grads[0], query, out, lse)
        by_key = (_shared(key, groups), _shared(value, groups))
        gradients = _by_block(by_query, by_key, ctx.scaling, 128 if query.shape[3] < 64 else 256)
        return gradients[0], *(g if groups == 1 else g.unflatten(1, (-1, groups)).sum(2) for g in gradients[1:]), None


def _shared(x: Tensor, groups: int) -> Tensor:
    """A KV head for each query head."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _by_block(
    by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...], scaling: float | None, block: int
) -> list[Tensor]:
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
    blocks = tokens // block
    whole = blocks * block
    gradients = [query.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3)]

    def within(part: slice, rows: int) -> None:
        """Blocks of `part` against themselves, `rows` of them at once."""
        q = [x[:, :, part].unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1) for x in by_query]
        k = [x[:, :, part].unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1) for x in by_key]
        for target, found in zip(gradients, _gradients(q, k, scaling, causal=True), strict=True):
            target[:, :, part].unflatten(2, (rows, -1)).copy_(found.unflatten(0, (batch, rows)).transpose(1, 2))

    def of_later_queries(keys: slice) -> None:
        """What queries after the block `keys` see of it. What it makes is freed before the next block."""
        after = slice(keys.stop, tokens)
        found = _gradients([x[:, :, after] for x in by_query], [x[:, :, keys] for x in by_key], scaling, causal=False)
        for target, place, part in zip(gradients, (after, keys, keys), found, strict=True):
            target[:, :, place] += part

    within(slice(0, whole), blocks)
    if whole < tokens:
        within(slice(whole, tokens), 1)
    for stop in range(block, tokens, block):
        of_later_queries(slice(stop - block, stop))
    return gradients


def _gradients(
    by_query: list[Tensor], by_key: list[Tensor], scaling: float | None, *, causal: bool
) -> tuple[Tensor, ...]:
    grad, query, out, lse = by_query
    return _backward(grad, query, *by_key, out, lse, 0.0, causal, scale=scaling)

"""What fused attention on a GPU allocates. Traced on a machine without GPU, torch would choose another kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ulysses_exp.model.attention.kernels import flex
from ulysses_exp.model.attention.kernels.scores import Scores


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Flash(torch.autograd.Function):
    """The allocations of FlashAttention 2 (Dao-AILab/flash-attention v2.7.4, csrc/flash_attn/flash_api.cpp, `mha_fwd`
    and `mha_bwd`; torch's own copy, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, is the same).

    Forward: the output and, in fp32, a log-sum-exp a query and head, both kept. Backward: an fp32 accumulator of the
    query's gradient, a row sum a query and head, and where KV heads are shared their gradients a *query* head, summed
    afterwards. In fp32 torch takes its memory-efficient kernel, which has no accumulator.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, tokens, dim] each -> [batch, heads, tokens, dim of a value], laid out [batch, tokens, ...]."""
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        out = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        batch, heads, tokens, dim = query.shape
        contiguous = grads[0].transpose(1, 2).contiguous()
        row_sum = query.new_empty(batch, heads, _rounded(tokens, 128), dtype=torch.float32)
        accumulator = None
        if query.dtype != torch.float32:
            shape = (batch, _rounded(tokens, 128), heads, _rounded(dim, 32))
            accumulator = query.new_empty(shape, dtype=torch.float32)
        own = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value)]
        if key.shape[1] != heads:
            per_query_head = [t.new_empty(batch, t.shape[2], heads, t.shape[3]) for t in (key, value)]
            del per_query_head
        del contiguous, row_sum, accumulator
        return tuple(gradient.transpose(1, 2) for gradient in own)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of `torch.nn.functional.scaled_dot_product_attention`; a mask costs what it takes itself, no more."""
    return _Flash.apply(query, key, value)


def _flexible(query: Tensor, key: Tensor, value: Tensor, mask: None, scores: Scores) -> Tensor:
    """In place of `kernels.flex.attention`, whose compiled kernel keeps and makes as much."""
    out: Tensor = _Flash.apply(query, key, value)
    if scores.sinks is not None:  # kept for the sinks' gradient: out as it was, and the shares
        out = out * (out.new_empty(out.shape[:-1]) + scores.sinks[None, :, None])[..., None]
    return out.transpose(1, 2)


@contextlib.contextmanager
def instead_of_torchs() -> Iterator[None]:
    """Within, scaled_dot_product_attention and flex_attention allocate what a GPU's fused kernels do."""
    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        patch.object(flex, "attention", _flexible),
        patch.object(flex, "block_mask", lambda *_: None),
    ):
        yield

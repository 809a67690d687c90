"""What the fused kernels of ALST's recipes allocate: `model.type: liger` replaces four parts of transformers' Llama.

Liger Kernel 0.5 (linkedin/Liger-Kernel, src/liger_kernel/ops: rms_norm.py, swiglu.py, rope.py): each kernel works in
fp32 registers, saves its inputs and writes gradients in place, where transformers' modules make fp32 copies of the
activations. Only sizes matter here, nothing is computed. The fused loss is this project's tiled loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number a token; the input's gradient takes the place of the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.weight = weight.shape, weight.dtype, weight.device
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        _ = ctx.saved_tensors
        shape, dtype, device = ctx.weight
        return grads[0], torch.empty(shape, dtype=dtype, device=device)


class _SiLUMul(torch.autograd.Function):
    """Keeps gate and up; their gradients take their places."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate.detach(), up.detach()


class _Rope(torch.autograd.Function):
    """Turns queries and keys where they are."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[1]


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


@contextlib.contextmanager
def liger() -> Iterator[None]:
    """Within, a Llama allocates what it does with Liger's kernels."""
    from transformers.models.llama import modeling_llama as llama

    with (
        patch.object(llama.LlamaRMSNorm, "forward", lambda self, x: _RMSNorm.apply(x, self.weight)),
        patch.object(llama.LlamaMLP, "forward", _mlp),
        patch.object(llama, "apply_rotary_pos_emb", lambda query, key, *_args, **_kwargs: _Rope.apply(query, key)),
    ):
        yield

"""What of DeepSpeed 0.19.8 and torch 2.13 has to be told that there is one rank and no numbers.

Each is a symptom under fake tensors and a fake process group, not a defect in a real run.

- `torch.nn.Module._apply` swaps fake parameters with their converted selves and fails where nothing changed
  ("Couldn't swap Embedding.weight").
- ZeRO 3 compares its trace with the other ranks', which a fake group does not have ("Detected a disagreement").
- transformers takes fake tensors for a graph being traced, leaves positions unread and makes a mask of all pairs of
  tokens (masking_utils.find_packed_sequence_indices).
- DeepSpeed's own exchange is an operator (deepspeed::dim_zero_all_to_all) that on fake tensors sends nothing.
- Whether weights lose bits in bf16 cannot be seen; random ones do.
- DeepSpeed makes the sequence-parallel groups of all ranks, and each takes torch as long as there are ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from deepspeed import comm
from deepspeed.runtime.sequence_parallel import ulysses_sp
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor
from transformers import masking_utils

from ulysses_exp.rank import mixed_precision


def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` as it is on real tensors: `param.data = fn(param)`."""
    for module in self.modules() if recurse else [self]:
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    before = parameter.data
                    after = fn(before)
                    if after is not before:
                        parameter.data = after
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


class _Exchange(torch.autograd.Function):
    """What the operator does on real tensors: an all-to-all along dimension 0, and another one back."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> Tensor:
        ctx.group = group
        output = torch.empty_like(tensor)
        comm.all_to_all_single(output, tensor, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _Exchange.forward(ctx, ctx.group, gradients[0].contiguous())


def _exchange(group: Any, tensor: Tensor) -> Tensor:
    return _Exchange.apply(group, tensor.contiguous())


def _own_group(make: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.new_group`, which returns the same for a group without this rank (0)."""

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and 0 not in ranks:
            return torch.distributed.GroupMember.NON_GROUP_MEMBER
        return make(ranks, *args, **kwargs)

    return new_group


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within, they are as described."""
    with (
        patch.object(torch.nn.Module, "_apply", _apply),
        patch.object(torch.distributed, "new_group", _own_group(torch.distributed.new_group)),
        patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
        patch.object(ulysses_sp, "_dim_zero_all_to_all", _exchange),
        patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None),
        patch.object(mixed_precision, "loses_bits", lambda full, low: True),
    ):
        yield

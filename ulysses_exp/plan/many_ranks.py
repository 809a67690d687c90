"""What ZeRO 3 does for each rank in turn, traced at once.

DeepSpeed 0.19.8 puts a gathered weight together from one part a rank, and cuts a gradient into as many. On tensors
without memory each part takes as long as a matrix product, so that a trace would take time in proportion to the ranks.
What is allocated is the same, but for the padding of the last parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from deepspeed import comm
from deepspeed.runtime.zero import partition_parameters, stage3
from torch import Tensor

#: Ranks up to which everything is traced as it is.
FEW = 1


def _reduce_scatter(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """`coalesced_collectives.reduce_scatter_coalesced`."""
    ranks = comm.get_world_size(group)
    parts = [-(-tensor.numel() // ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % ranks == 0:
        flat = tensors[0].view(-1)
    else:
        flat = tensors[0].new_empty(sum(parts) * ranks)
    flat.div_(ranks)
    own = flat.narrow(0, 0, sum(parts))
    comm.reduce_scatter_fn(own, flat, group=group, async_op=False)
    return [
        piece.narrow(0, 0, min(piece.numel(), t.numel())) for piece, t in zip(own.split(parts), tensors, strict=True)
    ]


def _wait(self: Any, handle_dependency: bool = True) -> None:
    """`partition_parameters.AllGatherCoalescedHandle.wait`, without quantization."""
    if self.complete:
        return
    self.allgather_handle.wait()
    for parameter in self.params:
        shard = parameter.ds_tensor
        gathered = torch.empty(parameter.ds_numel, dtype=self.partitions[0].dtype, device=self.partitions[0].device)
        parameter.data = gathered.view(parameter.ds_shape).to(shard.dtype)
        parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
    self.complete = True


@contextlib.contextmanager
def at_once(ranks: int) -> Iterator[None]:
    """Within, as described, where `ranks` are more than FEW."""
    if ranks <= FEW:
        yield
        return
    with (
        patch.object(stage3, "reduce_scatter_coalesced", _reduce_scatter),
        patch.object(partition_parameters.AllGatherCoalescedHandle, "wait", _wait),
    ):
        yield

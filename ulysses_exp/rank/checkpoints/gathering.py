"""Whole fp32 tensors on every rank, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist

from ulysses_exp.rank.checkpoints.fingerprints import names
from ulysses_exp.rank.checkpoints.homes import WEIGHTS, fragments
from ulysses_exp.rank.checkpoints.shards import plan
from ulysses_exp.rank.checkpoints.streaming import communication_device


def full_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full fp32 weights (in bf16 training the masters) of each parameter, in host memory.

    Collective over the world: every rank has to take every tensor.
    """
    held = {f.name: f for f in fragments(engine) if f.kind == WEIGHTS}
    rank = dist.get_rank()
    for shard in plan(held.values(), names(engine)):
        for tensor in shard.tensors:
            # bits, not numbers: adding 0.0 to -0.0 would change it
            whole = torch.zeros(tensor.nbytes, dtype=torch.uint8, device=communication_device())
            if any(part.rank == rank for part in tensor.parts):
                mine = held[tensor.name]
                begin = mine.start * tensor.dtype.itemsize
                data = mine.data.view(torch.uint8)
                whole[begin : begin + len(data)] = data.to(whole.device)
            if dist.get_world_size() > 1:
                dist.all_reduce(whole)
            yield tensor.name, whole.cpu().view(tensor.dtype).view(tensor.shape)

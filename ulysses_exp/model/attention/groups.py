"""The process groups of a registration, as what `deepspeed.initialize(mpu=...)` takes.

Upstream (DeepSpeed 0.19.8, parallel_state_sp.py) keeps them in variables of a module: one registration a process, whose
groups nothing takes down. Here they belong to a registration, so a process may have several, of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.utils.groups as deepspeeds
import torch.distributed as dist
from torch.distributed import ProcessGroup


class Groups:
    """The group that shares a sequence, `sp` contiguous ranks, and the one whose gradients are summed, all ranks."""

    def __init__(self, sequence: ProcessGroup, everyone: ProcessGroup):
        self._sequence, self._everyone = sequence, everyone

    #: By this name DeepSpeed tells an mpu of sequence parallelism from Megatron's (utils/groups.py); it is not called
    initialize_sequence_parallel = None

    def get_sequence_parallel_group(self) -> ProcessGroup:
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sequence)

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence)

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        return self._everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._everyone)

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._everyone)

    # to DeepSpeed, what is not data parallel is a model's
    get_model_parallel_group = get_sequence_parallel_group
    get_model_parallel_world_size = get_sequence_parallel_world_size
    get_model_parallel_rank = get_sequence_parallel_rank


@contextmanager
def groups(sp: int) -> Iterator[Groups]:
    """Makes the groups of this rank, and takes them down. Collective over all ranks at entry.

    Raises:
        ValueError: `sp` does not divide the ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % sp:
        raise ValueError(f"{world} ranks do not divide into groups of sp.size={sp}")
    before = deepspeeds.mpu
    shared = [dist.new_group(range(first, first + sp)) for first in range(0, world, sp)][rank // sp]
    everyone = dist.new_group(range(world))
    # new_group returns while other ranks still connect to this one; who leaves the context early would fail them
    dist.barrier()
    try:
        yield Groups(shared, everyone)
    finally:
        deepspeeds.mpu = before
        if dist.is_initialized():
            for group in (shared, everyone):
                dist.destroy_process_group(group)

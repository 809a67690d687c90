"""All-to-alls, counted where they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ulysses_exp.launch import heartbeat


class AllToAllCounter:
    """Counts the all-to-alls that this process starts while the context is open.

    Wraps the functions of `torch.distributed` through which DeepSpeed's and this project's exchanges go. `bytes` is
    what this rank sends to *other* ranks: the part of a buffer that it keeps for itself crosses no link.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> AllToAllCounter:
        single, listed = torch.distributed.all_to_all_single, torch.distributed.all_to_all
        self._originals = {"all_to_all_single": single, "all_to_all": listed}

        def counted_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
            size = torch.distributed.get_world_size(group)
            row = input.numel() // max(1, input.shape[0])
            own = (
                input_split_sizes[torch.distributed.get_rank(group)] * row
                if input_split_sizes
                else input.numel() // size
            )
            heartbeat.beat()
            self.calls += 1
            self.bytes += (input.numel() - own) * input.element_size()
            return single(output, input, output_split_sizes, input_split_sizes, group, async_op)

        def counted_listed(output_tensor_list, input_tensor_list, group=None, async_op=False):
            own = torch.distributed.get_rank(group)
            heartbeat.beat()
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for r, t in enumerate(input_tensor_list) if r != own)
            return listed(output_tensor_list, input_tensor_list, group, async_op)

        torch.distributed.all_to_all_single = counted_single
        torch.distributed.all_to_all = counted_listed
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._originals.items():
            setattr(torch.distributed, name, function)

    def since(self, mark: tuple[int, int]) -> tuple[int, int]:
        """(calls, bytes) after `mark`, an earlier value of `now`."""
        return self.calls - mark[0], self.bytes - mark[1]

    @property
    def now(self) -> tuple[int, int]:
        return self.calls, self.bytes

"""What of DeepSpeed 0.19.8 and torch 2.13 has to be told that there is one rank and no numbers.

Each is a symptom under fake tensors and a fake process group, not a defect in a real run.

- `torch.nn.Module._apply` swaps fake parameters with their converted selves and fails where nothing changed
  ("Couldn't swap Embedding.weight").
- ZeRO 3 compares its trace with the other ranks', which a fake group does not have ("Detected a disagreement").
- DeepSpeed's communication wrapper knows no backend of the name `fake`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor


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


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within, the three are as described."""
    with (
        patch.object(torch.nn.Module, "_apply", _apply),
        patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None),
    ):
        yield

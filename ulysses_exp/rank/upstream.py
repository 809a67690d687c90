"""What is changed of DeepSpeed for a rank, each with the version that needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import deepspeed
from deepspeed.runtime import engine as engines


def without_operators_of_its_own() -> None:
    """DeepSpeed finds none of its own operators, and does not look for them.

    0.19.8 looks when the table is first asked for, with a C compiler and torch.cuda.is_available() for each operator:
    seconds, and a process whose forks cannot use a GPU (ops/__init__.py, `_probe_compatible_ops`). On CPU it would then
    build and use its shared-memory all-reduce, which leaves files in /dev/shm (comm/torch.py; docs/findings.md). No
    operator is used here.
    """
    deepspeed.ops.__compatible_ops__ = {}


@contextlib.contextmanager
def stage_1_like_the_others() -> Iterator[None]:
    """Within, an engine of stage 1 in bf16 with fp32 gradients gets the optimizer of stages 1 and 2.

    0.19.8 takes another one, BF16_Optimizer, for this alone, and not with its states in host memory (engine.py,
    `_do_optimizer_sanity_check`). That holds all fp32 gradients for good and reduces them to every rank.
    """
    chosen = engines.DeepSpeedEngine._do_optimizer_sanity_check

    def choose(self: Any, optimizer: Any) -> Any:
        found = chosen(self, optimizer)
        return engines.ZERO_OPTIMIZATION if found == engines.BFLOAT16 else found

    with patch.object(engines.DeepSpeedEngine, "_do_optimizer_sanity_check", choose):
        yield

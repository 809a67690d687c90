"""What is changed of DeepSpeed for a rank, each with the version that needs it."""

from __future__ import annotations

import deepspeed


def without_operators_of_its_own() -> None:
    """DeepSpeed finds none of its own operators, and does not look for them.

    0.19.8 looks when the table is first asked for, with a C compiler and torch.cuda.is_available() for each operator:
    seconds, and a process whose forks cannot use a GPU (ops/__init__.py, `_probe_compatible_ops`). On CPU it would then
    build and use its shared-memory all-reduce, which leaves files in /dev/shm (comm/torch.py; docs/findings.md). No
    operator is used here.
    """
    deepspeed.ops.__compatible_ops__ = {}

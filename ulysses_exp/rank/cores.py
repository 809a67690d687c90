"""The cores of a rank: how many threads it computes with, and beside which GPU they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from torch.numa import binding

from ulysses_exp.config import machine
from ulysses_exp.launch.environment import THREADS_FOR_US_TO_SAY


def threads(device: str, environment: Mapping[str, str] = os.environ) -> int:
    """One on CPU, where ranks are more than cores as a rule; else a rank's share of the cores. OMP_NUM_THREADS of the
    user's wins. On an accelerator, loading a model and an optimizer in host memory wait for these threads."""
    given, ranks = int(environment.get("OMP_NUM_THREADS", "1")), environment.get("LOCAL_WORLD_SIZE")
    if device == "cpu" or THREADS_FOR_US_TO_SAY not in environment or ranks is None:
        return given
    return max(1, int(machine.cores()) // int(ranks))


def bind_beside(gpu: int) -> None:
    """From now on all threads of this process run on the NUMA node of its GPU, on cores that they might use before.

    torch binds processes that torch starts, and those only where there is numactl. Ranks are started by others, so its
    two steps are called here (torch 2.13, numa/binding.py). A machine that does not say where a GPU is binds nothing.
    """
    try:
        near = binding._get_logical_cpus_to_bind_to(
            gpu_index=gpu, numa_options=binding.NumaOptions(binding.AffinityMode.NODE)
        )
        if near:
            binding._bind_all_threads_in_current_process_to_logical_cpus(logical_cpu_indices=near)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"not bound to the cores beside GPU {gpu}: {error}", file=sys.stderr)

"""On CPU `get_accelerator().max_memory_allocated()` is not a peak: it misses what was freed before it was asked.

deepspeed 0.19.8 (accelerator/cpu_accelerator.py: the largest RSS at the moments of the calls).
"""

import os
import resource
import signal
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from deepspeed.accelerator import get_accelerator

MIB = 2**20


if __name__ == "__main__":
    signal.alarm(60)
    accelerator = get_accelerator()
    accelerator.reset_peak_memory_stats()
    start, kernel_start = accelerator.max_memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.ones(1024 * MIB, dtype=torch.uint8)  # a gibibyte, gone at once
    reported = (accelerator.max_memory_allocated() - start) / MIB
    kernel = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - kernel_start) / MIB
    print(
        f"1024 MiB made and freed: max_memory_allocated +{reported:.0f} MiB, the kernel's ru_maxrss +{kernel:.0f} MiB"
    )
    sys.exit(0 if reported < 512 else 1)

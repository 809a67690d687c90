"""The peak memory of a rank, in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Starts a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not writable in some containers: then the mark is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current resident set size


def peak(device: torch.device) -> int:
    """On CUDA the allocator's peak. On CPU the kernel's high-water mark of the resident set (VmHWM): DeepSpeed's CPU
    `max_memory_allocated` is only the largest size seen at the moments when it was asked (docs/findings.md)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")

"""The peak memory of a rank, in bytes, and what on an accelerator runs out beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Starts a new high-water mark, and counts retries and failures of the allocator from zero."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)
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


def allocator(device: torch.device) -> dict[str, int]:
    """What `peak` does not say of a GPU whose memory runs out; nothing elsewhere, which has no such allocator.

    Returns:
        peak_reserved_bytes: the most that torch's allocator has taken of the device since `reset_peak`, what lies
            between its blocks included. This, not what was allocated, is what runs out.
        alloc_retries: how often it found no room, gave back what it kept and tried again; each costs milliseconds.
        ooms: how often that did not help.
        beside_allocator_bytes: what else of the device is taken now: CUDA's context, NCCL's buffers, libraries, and
            other processes on the same device, which CUDA does not tell apart.
    """
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
        "alloc_retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
        "beside_allocator_bytes": max(0, total - free - stats["reserved_bytes.all.current"]),
    }

"""A limit on the memory of one rank, at which torch's allocator fails as it does when a GPU is full."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch


def held() -> int:
    """Bytes of private memory that this process really occupies (RssAnon): heap and tensors, no mapped libraries."""
    return _status("RssAnon")


@contextlib.contextmanager
def limited(device: torch.device, budget: int, before: int) -> Iterator[None]:
    """While open, this process may take `budget` bytes beyond the `before` that it held without model and engine.

    On CUDA the limit is the caching allocator's. On CPU it is RLIMIT_DATA (getrlimit(2); Linux counts private writable
    mappings since 4.7), so a tensor too many fails to be allocated, at once and in the rank that asked for it. The
    other ways do less: RLIMIT_AS also counts mapped libraries and address space that malloc has only reserved, several
    GiB in a rank without a tensor; RLIMIT_RSS has no effect; a high-water mark read afterwards needs the memory.
    The stacks of threads that run by now count in RLIMIT_DATA as a whole, in `budget` not at all: what the process has
    taken so far is measured as resident memory.

    Args:
        before: what `held` returned before model and engine were built.

    Raises:
        MemoryError: more than `budget` is held already.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    taken = held() - before
    if taken > budget:
        raise MemoryError(f"model and engine take {taken} of {budget} bytes before the first step")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + budget - taken, hard))
    try:
        yield
    finally:  # also so that a rank out of memory can still say so
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status(field: str) -> int:
    """Bytes of a field of proc(5)'s /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024

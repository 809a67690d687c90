"""Where the time of an optimizer step goes: compute, the sequence-parallel exchange, ZeRO's collectives, input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Parts of the names under which torch's profiler shows all-to-alls: gloo's and NCCL's annotation, NCCL's kernel.
_ALL_TO_ALL = ("all_to_all", "alltoall", "sendrecv")

Interval = tuple[float, float]


def step_split(events: Iterable[Any], steps: int, input_seconds: float) -> dict[str, float]:
    """Seconds of one optimizer step, which add up to its duration under the profiler.

    Time in which a collective is in flight is the collective's, also where computation goes on beside it: `compute` is
    the time in which nothing but computation happens. The all-to-alls are the exchange; every other collective is
    counted as `zero`: ZeRO's gathers and reductions, and the one or two small ones with which a step's figures are
    collected.

    Args:
        events: of `torch.profiler.profile.events()` over `steps` steps. On CPU the backend's annotations are taken
            (`gloo:...`), on CUDA the kernels (`ncclDevKernel_...`): NCCL's annotations only cover the launch.
        input_seconds: of one step, measured outside the profiler.
    """
    window = 0.0
    all_to_alls: list[Interval] = []
    others: list[Interval] = []
    for event in events:
        name = event.name.lower()
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if name.startswith("profilerstep") and event.device_type.name == "CPU":
            window += interval[1] - interval[0]
        elif name.startswith(("gloo:", "nccldevkernel")):
            (all_to_alls if any(part in name for part in _ALL_TO_ALL) else others).append(interval)
    exchange = _covered(all_to_alls)
    zero = _covered(all_to_alls + others) - exchange
    split = {"exchange": exchange / steps, "zero": zero / steps, "input": input_seconds}
    return {"compute": max(0.0, window / steps - sum(split.values())), **split}


def _covered(intervals: list[Interval]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total

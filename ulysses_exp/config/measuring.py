"""Which step times count, and what follows from them."""

from __future__ import annotations

import statistics
from typing import Any

from ulysses_exp.config import TrainConfig

#: Steps that `train.profile` records, after one that warms the profiler up
PROFILED_STEPS = 2


def step_time(seconds: list[float], unmeasured: int) -> dict[str, float]:
    """Median and 90th percentile in seconds, without the first `unmeasured` steps unless there are no others."""
    measured = seconds[unmeasured:] or seconds
    ordered = sorted(measured)
    return {"median": statistics.median(ordered), "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}


def unmeasured(train: TrainConfig) -> int:
    """How many first steps are left out of speeds: they warm up, or the profiler makes them slower."""
    return train.unmeasured_steps + (1 + PROFILED_STEPS if train.profile else 0)


def speed(seconds: list[float], tokens: list[int], unmeasured: int) -> dict[str, Any]:
    """What results.json says of the speed of steps that took `seconds` for `tokens` each."""
    times = step_time(seconds, unmeasured)
    measured = tokens[unmeasured:] or tokens
    return {
        "tokens_per_second": sum(measured) / len(measured) / times["median"],
        "tokens_per_step": tokens[-1],
        "step_time_s": times,
        "unmeasured_steps": len(tokens) - len(measured),
    }

"""Step times and what follows from them."""

from __future__ import annotations

import statistics


def step_time(seconds: list[float], unmeasured: int) -> dict[str, float]:
    """Median and 90th percentile in seconds, without the first `unmeasured` steps unless there are no others."""
    measured = seconds[unmeasured:] or seconds
    ordered = sorted(measured)
    return {"median": statistics.median(ordered), "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}

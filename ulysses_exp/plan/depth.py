"""From traces of a few decoder layers to a guess at the whole depth.

Layers repeat, so what a model holds and sends grows by about the same amount with each, once there are enough of them
for DeepSpeed's own limits (gathered weights, the reduction bucket) to be reached. About: how much is gathered or waits
in a bucket at the fullest moment differs from depth to depth, and the whole depth multiplies that. So a search may be
led by it, and nothing more (`Planner.at` traces all layers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from ulysses_exp.config import Config
from ulysses_exp.plan.trace import Trace

#: DeepSpeed 0.19.8, runtime/zero/config.py, in numbers of elements: stage3_max_live_parameters, the
#: stage3_prefetch_bucket_size that may come on top, reduce_bucket_size and sub_group_size.
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000


def depths(config: Config, layers: int, layer_parameters: int, period: int = 1) -> tuple[int, ...]:
    """How many layers to trace: two numbers to extrapolate from, or all `layers` where that takes no longer.

    Three layers are the fewest in whose middle neither the embedding nor the head is gathered. Gradients are reduced
    whenever a bucket is full, so the fewer layers have to fill one.

    Args:
        layer_parameters: of one decoder layer.
        period: layers after which their types repeat.
    """
    bucket = REDUCE_BUCKET // layer_parameters + 1 if config.zero.stage else 0
    first = -(-max(bucket + (config.zero.stage == 3), 3) // period) * period
    second = first + period
    return (layers,) if first + second >= layers else (first, second)


def whole(traces: list[Trace], layers: int, config: Config) -> Trace:
    """The trace of `layers` layers, from one of them all or from two of fewer (at the same length)."""
    if len(traces) == 1:
        return traces[0]
    few, more = traces
    ratio = (layers - few.layers) / (more.layers - few.layers)

    def line(a: float, b: float) -> int:
        return round(a + (b - a) * ratio)

    parameters = line(few.parameters, more.parameters)
    own = line(few.parameters_per_rank, more.parameters_per_rank)
    device = {phase: _kinds(few.device[phase], more.device[phase], line) for phase in more.device}
    host = {phase: _kinds(few.host[phase], more.host[phase], line) for phase in more.host}
    if (
        config.zero.stage == 3 and "optimizer_step" in device
    ):  # the optimizer works on a sub group at a time: what it takes for that stops growing
        rest = _kinds(few.rest, more.rest, line)
        rest = {kind: min(size, device["optimizer_step"].get(kind, 0)) for kind, size in rest.items()}  # still held
        share = min(own, SUB_GROUP) / min(more.parameters_per_rank, SUB_GROUP)
        working = Counter(more.device["optimizer_step"]) - Counter(more.rest)
        device["optimizer_step"] = dict(
            Counter(rest) + Counter({kind: round(size * share) for kind, size in working.items()})
        )
    if config.zero.stage == 3:
        _limit_gathered(device, more, config)
    pairs = {(name, ranks): (calls, size) for name, ranks, calls, size in few.collectives}
    collectives = []
    for name, ranks, calls, size in more.collectives:
        before = pairs.get((name, ranks), (calls, size))
        collectives.append((name, ranks, line(before[0], calls), line(before[1], size)))
    return replace(
        more,
        layers=layers,
        parameters=parameters,
        parameters_per_rank=own,
        device=device,
        host=host,
        rest=_kinds(few.rest, more.rest, line),
        collectives=collectives,
        all_to_all_calls=line(few.all_to_all_calls, more.all_to_all_calls),
        all_to_all_bytes=line(few.all_to_all_bytes, more.all_to_all_bytes),
        host_copies=_kinds(few.host_copies, more.host_copies, line),
    )


def _limit_gathered(device: dict[str, dict[str, int]], traced: Trace, config: Config) -> None:
    """Gathered weights grow with the layers until DeepSpeed holds as many as it may."""
    itemsize = 2 if config.train.precision == "bf16" else 4
    limit = (MAX_LIVE_PARAMETERS + PREFETCH_BUCKET) * itemsize
    for phase in set(device) - {"start"}:
        gathered = device[phase].get("gathered_parameters", 0)
        seen = traced.device[phase].get("gathered_parameters", 0)
        device[phase]["gathered_parameters"] = min(gathered, max(limit, seen))


def _kinds(few: dict[str, int], more: dict[str, int], line: Callable[[float, float], int]) -> dict[str, int]:
    return {kind: max(0, line(few.get(kind, 0), more.get(kind, 0))) for kind in {**few, **more}}

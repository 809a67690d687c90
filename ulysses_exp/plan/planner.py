"""Memory of a layout at a length, and the longest sequence that fits.

What is said of a length comes from a trace of all layers. Where a search has to go is guessed from a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ulysses_exp.config import Config, device_of
from ulysses_exp.layout import Layout
from ulysses_exp.plan.depth import depths, whole
from ulysses_exp.plan.forks import Forks, TraceError, forks
from ulysses_exp.plan.trace import Request, Trace, trace

#: Lengths that a search traces at most; two or three are usual.
_TRIES = 10


@dataclass(frozen=True)
class Model:
    """What of the architecture decides how it is traced."""

    architecture: dict[str, Any]  # model_type and the arguments of its transformers configuration
    layers: int
    parameters: int  # tied ones once
    layer_parameters: int
    period: int  # layers after which their types repeat


def look_at(config: Config) -> Model:
    """Builds the configured model without memory and looks at it. Imports torch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    from ulysses_exp.model.build import pretrained_config

    architecture = pretrained_config(config)
    text = architecture.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    types = list(getattr(text, "layer_types", None) or [])
    period = next((n for n in range(1, len(types)) if all(t == types[i % n] for i, t in enumerate(types))), 1)
    return Model(
        architecture=config.model.architecture or text.to_dict(),
        layers=text.num_hidden_layers,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=max(sizes, default=1),
        period=period,
    )


class Planner:
    """Traces one configuration at whatever length is asked for, each length once."""

    def __init__(self, config: Config, *, gpu: bool, pool: Forks, **request: Any):
        """Args:
        gpu: plan for a GPU; else for this machine's processors.
        request: fields of `trace.Request` that differ from their defaults in every trace.

        Raises:
            TraceError: transformers builds no such model.
        """
        self.gpu, self.pool, self.request = gpu, pool, request
        (self.model,) = pool.map(look_at, [config])
        self.config = traceable(config, self.model.architecture)
        self.depths = depths(self.config, self.model.layers, self.model.layer_parameters, self.model.period)
        self._traces: dict[int, Future[Trace]] = {}
        self._guesses: dict[int, Trace] = {}

    def begin(self, seq_len: int) -> None:
        """Traces beside what the caller goes on to do; `at` waits for it."""
        if seq_len not in self._traces:
            self._traces[seq_len] = self.pool.start(trace, self._request(self._with(seq_len), self.model.layers))

    def at(self, seq_len: int) -> Trace:
        """The model's trace at `seq_len` tokens, all layers of it."""
        self.begin(seq_len)
        return self._traces[seq_len].result()

    def guess(self, seq_len: int) -> Trace:
        """`at` in a fraction of its time, and not to be relied on: see `depth`."""
        if len(self.depths) == 1:
            return self.at(seq_len)
        if seq_len not in self._guesses:
            config = self._with(seq_len)
            requests = [self._request(config, layers) for layers in self.depths]
            self._guesses[seq_len] = whole(self.pool.map(trace, requests), self.model.layers, config)
        return self._guesses[seq_len]

    def evaluation(self) -> Trace:
        """Of an evaluation that bypasses sequence parallelism, so that each rank holds a whole sequence."""
        return self.pool.start(trace, replace(self._request(self.config, self.model.layers), evaluation=True)).result()

    def _with(self, seq_len: int) -> Config:
        return replace(self.config, train=replace(self.config.train, seq_len=seq_len))

    def _request(self, config: Config, layers: int) -> Request:
        return Request(config, layers, self.gpu, self.model.parameters, **self.request)

    def longest(self, step: int, device_bytes: int, host_bytes: float = math.inf) -> int:
        """The longest sequence, a multiple of `step` tokens, whose peak stays within both limits; 0 where none does.

        Searched by guesses, and from where they lead to by traces of all layers: one, where the guesses were good.
        """
        limits = (device_bytes, host_bytes)
        guessed = _search(self.guess, max(step, self.config.train.seq_len // step * step), step, limits)
        return _search(self.at, max(step, guessed), step, limits)


def _search(at: Callable[[int], Trace], length: int, step: int, limits: tuple[float, float]) -> int:
    """The longest sequence whose peak by `at` stays within `limits` of device and host, from `length` on.

    Newton's method: of what is held at the fullest moment, the activations grow in proportion to the length and the
    rest stays, which gives the next length to trace. The fullest moment may be another one there, so it goes on until
    the next length is within 3 % of the last: so near, it is right to a small part of that.
    """
    fitting = 0
    for _ in range(_TRIES):
        traced = at(length)
        moments: list[tuple[dict[str, int], float]] = [(kinds, limits[0]) for kinds in traced.device.values()]
        moments += [(kinds, limits[1]) for phase, kinds in traced.host.items() if phase != "start"]
        following = min(_grown_to(limit, kinds, length) for kinds, limit in moments)
        if all(sum(kinds.values()) <= limit for kinds, limit in moments):
            fitting = max(fitting, length)
        following = max(0, int(min(following, 16 * length)) // step * step)
        if abs(following - length) <= max(0.03 * length, step) or following < step == length:
            return following if following >= step else 0
        length = max(step, following)
    return fitting


def _grown_to(limit: float, kinds: dict[str, int], length: int) -> float:
    """The length at which `kinds`, seen at `length`, come to `limit` bytes if the activations alone grow with it."""
    activations, all_kinds = kinds.get("activations", 0), sum(kinds.values())
    if not activations:
        return math.inf if all_kinds <= limit else 0.0
    return length * (limit - (all_kinds - activations)) / activations


def longest_sequence(config: Config, layout: Layout, memory_bytes: int) -> int | None:
    """How many tokens long a sequence `config` can train on at `layout` with `memory_bytes` a rank, by the plan.

    A first guess for a search that trains at growing lengths until memory runs out. Planned for the device that
    `config` trains on: on a GPU `memory_bytes` are what torch's allocator may take, on a CPU what tensors may. Takes
    seconds to a minute, in processes of its own; starts no ranks.

    Returns:
        A multiple of `layout.sp`; None where not even the shortest sequence fits, or the configuration does not run.
    """
    with forks(config) as pool:
        try:
            planner = Planner(config.at(layout), gpu=device_of(config) == "cuda", pool=pool)
            return planner.longest(layout.sp, memory_bytes) or None
        except TraceError:
            return None


def bypassed_evaluation_bytes(config: Config) -> int | None:
    """What evaluating one whole sequence on every rank takes beyond what the rank holds anyway, by the plan.

    Returns:
        Bytes; None where the configuration cannot be traced.
    """
    with forks(config) as pool:
        try:
            planned = Planner(config, gpu=device_of(config) == "cuda", pool=pool).evaluation()
        except TraceError:
            return None
    return planned.peak("evaluation") - sum(planned.rest.values())


def traceable(config: Config, architecture: dict[str, Any]) -> Config:
    """`config` as it is traced: two micro steps of many, random weights, and attention by a kernel that is at hand."""
    layout = config.layout
    steps = min(config.accumulation, 2)
    return replace(
        config,
        model=replace(config.model, architecture=architecture, name_or_path=None),
        sp=replace(config.sp, attention="sdpa"),
        train=replace(config.train, global_batch_size=steps * layout.dp * config.train.micro_batch_size),
    )

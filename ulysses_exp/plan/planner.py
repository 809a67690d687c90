"""Memory of a layout at a length, and the longest sequence that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ulysses_exp.config import Config
from ulysses_exp.plan.depth import depths, whole
from ulysses_exp.plan.hardware import Hardware
from ulysses_exp.plan.trace import Request, Trace
from ulysses_exp.plan.tracers import Tracers


@dataclass(frozen=True)
class Model:
    """What of the architecture decides how it is traced."""

    layers: int
    layer_parameters: int
    period: int  # layers after which their types repeat


def model_of(config: Config) -> Model:
    """Builds the configured model without memory and looks at it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    from ulysses_exp.models import pretrained_config

    architecture = pretrained_config(config)
    text = architecture.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    types = list(getattr(text, "layer_types", None) or [])
    period = next((n for n in range(1, len(types)) if all(t == types[i % n] for i, t in enumerate(types))), 1)
    return Model(layers=text.num_hidden_layers, layer_parameters=max(sizes, default=1), period=period)


class Planner:
    """Traces one configuration on one machine at whatever length is asked for, each length once."""

    def __init__(self, config: Config, hardware: Hardware, tracers: Tracers, deepspeed: dict[str, Any] | None = None):
        """Args: deepspeed: entries of DeepSpeed's configuration that differ from what training tells it."""
        self.hardware, self.tracers, self.deepspeed = hardware, tracers, deepspeed or {}
        self.config = traceable(config)
        self.model = model_of(config)
        self.depths = depths(self.config, self.model.layers, self.model.layer_parameters, self.model.period)
        self._traces: dict[int, Trace] = {}

    def at(self, seq_len: int) -> Trace:
        """The whole model's trace at `seq_len` tokens."""
        if seq_len not in self._traces:
            config = replace(self.config, train=replace(self.config.train, seq_len=seq_len))
            traces = self.tracers.trace([self._request(config, layers) for layers in self.depths])
            self._traces[seq_len] = whole(traces, self.model.layers, config)
        return self._traces[seq_len]

    def full(self) -> Trace:
        """The trace of all layers at `train.seq_len`, nothing extrapolated: to check `at` against."""
        (trace,) = self.tracers.trace([self._request(self.config, self.model.layers)])
        return trace

    def _request(self, config: Config, layers: int) -> Request:
        return Request(config, layers, self.hardware.is_gpu, deepspeed=self.deepspeed)

    def longest(self, step: int) -> int:
        """The longest sequence, a multiple of `step` tokens, that fits; 0 where none does.

        Memory grows linearly with the length, but the moment at which it is fullest may change. So each guess is
        traced: the first from the activations' share at `train.seq_len`, the next from the line through the two
        lengths nearest to the limit, until a guess is within half a percent of one that was traced.
        """
        budget = self.hardware.budget
        asked = max(step, self.config.train.seq_len // step * step)
        points: dict[int, int] = {}
        guess = asked
        for _ in range(6):
            trace = self.at(guess)
            points[guess] = trace.peak()
            guess = _on_line(points, budget, step) if len(points) > 1 else _by_activations(trace, budget, step)
            if guess == 0 or any(abs(guess - length) <= 0.005 * length for length in points):
                break
        return guess


def _by_activations(trace: Trace, budget: int, step: int) -> int:
    """The length at which the activations fill what the rest leaves of the budget."""
    kinds = max(trace.device.values(), key=lambda kinds: sum(kinds.values()))
    activations = kinds.get("activations", 0)
    room = budget - (sum(kinds.values()) - activations)
    return int(trace.seq_len * min(room / max(activations, 1), 16.0)) // step * step if room > 0 else step


def _on_line(points: dict[int, int], budget: int, step: int) -> int:
    """Where the line through the two points nearest to the budget meets it."""
    nearest = sorted(points.items(), key=lambda point: abs(point[1] - budget))[:2]
    (a, at_a), (b, at_b) = sorted(nearest)
    slope = (at_b - at_a) / (b - a)
    if slope <= 0:  # both dominated by something that does not depend on the length
        return 4 * b if at_b <= budget else 0
    return max(0, int(min(b + (budget - at_b) / slope, 16 * b)) // step * step)


def traceable(config: Config) -> Config:
    """`config` as it is traced: two micro steps of many, and attention by a kernel that this machine need not have."""
    layout = config.layout
    steps = min(config.accumulation, 2)
    return replace(
        config,
        sp=replace(config.sp, attention="sdpa"),
        train=replace(config.train, global_batch_size=steps * layout.dp * config.train.micro_batch_size),
    )

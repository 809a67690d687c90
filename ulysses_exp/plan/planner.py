"""Memory of a layout at a length, and the longest sequence that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def __init__(self, config: Config, hardware: Hardware, tracers: Tracers):
        self.hardware, self.tracers = hardware, tracers
        self.config = traceable(config)
        self.model = model_of(config)
        self.depths = depths(self.config, self.model.layers, self.model.layer_parameters, self.model.period)
        self._traces: dict[int, Trace] = {}

    def at(self, seq_len: int) -> Trace:
        """The whole model's trace at `seq_len` tokens."""
        if seq_len not in self._traces:
            config = replace(self.config, train=replace(self.config.train, seq_len=seq_len))
            requests = [Request(config, layers, self.hardware.is_gpu) for layers in self.depths]
            self._traces[seq_len] = whole(self.tracers.trace(requests), self.model.layers, config)
        return self._traces[seq_len]

    def full(self) -> Trace:
        """The trace of all layers at `train.seq_len`, nothing extrapolated: to check `at` against."""
        (trace,) = self.tracers.trace([Request(self.config, self.model.layers, self.hardware.is_gpu)])
        return trace

    def longest(self, step: int) -> int:
        """The longest sequence, a multiple of `step` tokens, that fits; 0 where none does.

        Memory grows linearly with the length but for the moment at which it is fullest, which may change: the search
        follows the line through its two nearest traces until it predicts its own last length.
        """
        budget = self.hardware.budget
        asked = max(step, self.config.train.seq_len // step * step)
        points = {length: self.at(length).peak() for length in (asked, max(step, asked // 2 // step * step))}
        if len(points) == 1:
            points[2 * step] = self.at(2 * step).peak()
        for _ in range(6):
            guess = _on_line(points, budget, step)
            if guess in points or guess == 0:
                break
            points[guess] = self.at(guess).peak()
            if abs(points[guess] - budget) < 0.002 * budget:
                guess = min(guess, _on_line(points, budget, step)) if points[guess] > budget else guess
                break
        fitting = [length for length, peak in points.items() if peak <= budget]
        return max([guess if guess == 0 or points.get(guess, 0) <= budget else 0, *fitting], default=0)


def _on_line(points: dict[int, int], budget: int, step: int) -> int:
    """Where the line through the two points nearest to the budget meets it."""
    (a, at_a), (b, at_b) = sorted(sorted(points.items(), key=lambda p: abs(p[1] - budget))[:2])
    slope = (at_b - at_a) / (b - a)
    if slope <= 0:  # both dominated by something that does not depend on the length
        return 2 * b if at_b <= budget else 0
    guess = (b + (budget - at_b) / slope) // step * step
    return max(0, int(min(guess, 16 * b)))


def traceable(config: Config) -> Config:
    """`config` as it is traced: two micro steps of many, and attention by a kernel that this machine need not have."""
    layout = config.layout
    steps = min(config.accumulation, 2)
    return replace(
        config,
        sp=replace(config.sp, attention="sdpa"),
        train=replace(config.train, global_batch_size=steps * layout.dp * config.train.micro_batch_size),
    )

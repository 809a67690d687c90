"""An optimizer step whose loss or gradient is not finite: where it shows first, and how its update is left out.

What is measured in every step stays on the device: the largest magnitude of each gradient, one number a parameter.
The host looks at them only where a step's loss or gradient norm, which it asks for anyway, turns out not to be finite.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ulysses_exp.rank.checkpoints.homes import Fragment, fragments, module_fragments

if TYPE_CHECKING:
    from ulysses_exp.rank.session import Session


@dataclass(frozen=True)
class Watched:
    """What is kept of a step on this rank's device until the host asks for its figures."""

    losses: list[torch.Tensor]  # of the micro batches
    names: list[str]  # of the parameters whose gradients this rank holds a part of
    gradients: torch.Tensor  # `extremes` of these
    weights: torch.Tensor | None  # `extremes` of the weights before the step, where the step may spoil them


def watch(engine: deepspeed.DeepSpeedEngine, losses: list[torch.Tensor]) -> Watched:
    """To be called between the last backward of a step and the step. Does not wait for the device."""
    found = gradients(engine)
    weights = None
    if _steps_anyway(engine):  # elsewhere the weights can be looked at after the step
        weights = extremes((f.data for f in module_fragments(engine) if f.data.numel()), engine.device)
    return Watched(losses, [name for name, _ in found], extremes((g for _, g in found), engine.device), weights)


def gradients(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, torch.Tensor]]:
    """(parameter, this rank's part of its reduced gradient), between the last backward of a step and the step.

    Under optimizer offload the gradient's norm stands for it: DeepSpeed has taken it before it moved the gradient.
    Written against DeepSpeed 0.19.8.
    """
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        sharded = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
        groups = optimizer.fp16_groups if sharded else optimizer.params_in_partition
        if optimizer.offload_optimizer if sharded else optimizer.cpu_offload:
            norms = optimizer.norm_for_param_grads
            keys = [(names[p], optimizer.get_param_id(p)) for group in groups for p in group]
            return [(name, torch.as_tensor(norms[key])) for name, key in keys if key in norms]
        pairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for i, group in enumerate(groups):
            parts = [g for g in optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            pairs += zip(group, parts, strict=False)  # those of the last rank end in padding
        return [(names[p], g) for p, g in pairs if g is not None and g.numel()]
    return [(name, p.grad) for p, name in names.items() if p.grad is not None and p.grad.numel()]


def extremes(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Largest magnitude of each tensor, fp32 [tensors]; nan where one holds nan. Does not wait for the device."""
    held = list(tensors)
    if not held:
        return torch.zeros(0, device=device)
    return torch.stack([found.to(device).float() for found in torch._foreach_norm(held, math.inf)])


def _steps_anyway(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether DeepSpeed applies an update whose gradient norm is not finite; elsewhere it leaves such a step out.

    0.19.8 leaves it out at stage 3, at stage 0 in bf16, and at stages 1 and 2 in fp32 or with `check_grad_overflow`.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return optimizer.dtype == torch.bfloat16 and not optimizer.check_grad_overflow
    return isinstance(optimizer, torch.optim.Optimizer)


def all_finite(step: Watched) -> bool:
    """Whether the losses and gradients of all ranks are finite. Waits for the device. Collective over the world."""
    finite = torch.stack([torch.isfinite(values).all() for values in (*step.losses, step.gradients)]).all().float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def discard(engine: deepspeed.DeepSpeedEngine) -> contextlib.AbstractContextManager[None]:
    """Within, the engine's step changes neither weights nor optimizer states.

    torch's optimizers pass over parameters without a gradient. DeepSpeed's leave out a step whose gradient norm is not
    finite, which is then made sure of: on some rank only the loss may have been. `training.deepspeed_config` has
    stages 1 and 2 check in bf16, too.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        for parameter in engine.module.parameters():
            parameter.grad = None
        engine.skipped_steps += 1  # DeepSpeed's own count, which it keeps where it leaves a step out itself
        return _without_clipping(engine)  # which fails where there are no gradients
    if getattr(optimizer, "norm_for_param_grads", None):  # offload: the norm is that of these
        for key, norm in optimizer.norm_for_param_grads.items():
            optimizer.norm_for_param_grads[key] = norm * math.nan
    else:
        for _, gradient in gradients(engine):
            gradient.view(-1)[:1].fill_(math.nan)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _without_clipping(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    engine.clip_fp32_gradients = lambda: None
    try:
        yield
    finally:
        del engine.clip_fp32_gradients


def explain(session: Session, step: int, watched: Watched) -> dict[str, Any]:
    """Where it shows that step `step`, counted from 1, is not finite. Collective over the world.

    Returns:
        `step`; `what`: weights, loss or gradient, whichever came first; `value`: nan or inf; `rank`; where it is
        weights or a gradient, `parameter` and how many `parameters`; `sequences` of the data that the rank had read.
    """
    sequences = session.batches.sequences(step - 1)
    weights = [f for f in module_fragments(session.engine) if f.data.numel()]
    before = watched.weights if watched.weights is not None else _apart(weights)
    losses = [float(loss) for loss in watched.losses]
    mine = {
        "weights": _bad([f.name for f in weights], before),
        # backward goes from the last layer to the first, so what is not finite began in the last of the names
        "gradient": _bad(watched.names, watched.gradients)[::-1],
        "loss": [(sequences[k], loss) for k, loss in enumerate(losses) if not math.isfinite(loss)],
        "all": [n for part in sequences for n in part],
    }
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    for what in ("weights", "loss", "gradient"):
        for rank, found in enumerate(every):
            if not found[what]:
                continue
            first, value = found[what][0]
            trouble = {"step": step, "what": what, "value": _word(value), "rank": rank}
            if what == "loss":
                return trouble | {"sequences": list(first)}
            count = len({name for other in every for name, _ in other[what]})
            read = {} if what == "weights" else {"sequences": found["all"]}
            return trouble | {"parameter": first, "parameters": count, **read}
    # every gradient is finite, and their squares add up to more than there is
    return {"step": step, "what": "gradient", "value": "inf", "rank": 0}


def spoiled_state(engine: deepspeed.DeepSpeedEngine) -> tuple[str, str] | None:
    """(kind, name) of the first weight or optimizer state that is not finite. Collective over the world."""
    held = [f for f in fragments(engine) if f.data.numel() and f.data.is_floating_point()]
    wrong = _bad([(f.kind, f.name) for f in held], _apart(held))
    every: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, wrong[0][0] if wrong else None)
    return next((found for found in every if found is not None), None)


def words(trouble: dict[str, Any]) -> str:
    """`explain`'s findings as the first part of a sentence."""
    step, value, rank, parameter = (trouble.get(key) for key in ("step", "value", "rank", "parameter"))
    data = _sequences(trouble.get("sequences") or [])
    if trouble["what"] == "loss":
        return f"step {step}: the loss is {value} on rank {rank}{data}"
    if parameter is None:
        return f"step {step}: the gradient norm is {value}"
    more = trouble["parameters"] - 1
    others = f", then in {more} more" if more else ""
    if trouble["what"] == "weights":
        return f"step {step}: it began with weights that are {value}, first {parameter}{others}"
    return f"step {step}: the gradient norm is {value}; first in {parameter} on rank {rank}{data}{others}"


def _sequences(numbers: list[int]) -> str:
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f" (data: sequence {numbers[0]})"
    return f" (data: sequences {numbers[0]} to {numbers[-1]})"


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "inf"


def _bad(names: list[Any], values: torch.Tensor) -> list[tuple[Any, float]]:
    return [(name, value) for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]


def _apart(held: list[Fragment]) -> torch.Tensor:
    """`extremes` of tensors of several types and devices."""
    return torch.tensor([float(torch.linalg.vector_norm(f.data, math.inf)) for f in held])

"""What an engine counts besides its tensors: steps, learning rate, schedule, random numbers."""

from __future__ import annotations

import base64
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def engine_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """As JSON: counters, hyperparameters of the parameter groups, the scheduler's state, each rank's generators.

    Collective over the world.
    """
    generators: list[dict[str, str]] = [_generators()]
    if dist.get_world_size() > 1:
        generators = [{}] * dist.get_world_size()
        dist.all_gather_object(generators, _generators())
    return {
        **{name: getattr(engine, name) for name in _COUNTERS},
        "groups": [
            {k: v for k, v in group.items() if k != "params" and isinstance(v, (int, float, bool, list, tuple))}
            for group in engine.basic_optimizer.param_groups
        ],
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "generators": generators,
    }


def restore(engine: deepspeed.DeepSpeedEngine, state: dict[str, Any]) -> None:
    """Takes over counters and the place in the schedule; generators where the number of ranks is the same.

    Learning rate, schedule and the other hyperparameters are those that the engine was built with, which are the
    checkpoint's unless its user asked for others.
    """
    for name in _COUNTERS:
        setattr(engine, name, state[name])
    # another layout accumulates over another number of micro steps; a step ends where this is a multiple of them
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None and state["scheduler"] is not None:
        step = state["scheduler"].get("last_epoch")
        if type(step) is not int or not 0 <= step < 2**53:
            raise TypeError("scheduler.last_epoch")
        go_to(engine, step)
    if len(state["generators"]) == dist.get_world_size():
        _restore_generators(state["generators"][dist.get_rank()])


def go_to(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Sets the learning rates that the engine's schedule, a LambdaLR, has after `step` steps.

    A function of the step alone, so for an unchanged schedule these are the rates that were saved, bit for bit.
    """
    schedule = engine.lr_scheduler
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._step_count, schedule._last_lr = step, step + 1, rates


def _generators() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _restore_generators(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)

"""What the checkpoints work around, in DeepSpeed 0.19.8. A failure here is good news: the workaround may go."""

from __future__ import annotations

import deepspeed
import torch
from checkpoint_ranks import run
from tiny_engine import Recipe, engine, steps

from ulysses_exp.layout import Layout
from ulysses_exp.rank.checkpoints.homes import fragments


def sign_of_zero() -> list[bool]:
    layout = Layout(1, 2, 2)
    with engine(layout) as made:
        for fragment in fragments(made):
            fragment.data.fill_(-0.0)
        full = [deepspeed.utils.safe_get_full_fp32_param(p) for p in made.module.parameters()]
        return [bool(torch.signbit(tensor).all()) for tensor in full]


def test_safe_get_full_loses_the_sign_of_zero() -> None:
    """So checkpoints move bytes, and never add."""
    assert not any(run(2, sign_of_zero)[0])


def public_function_at_stage_0() -> list[bool]:
    with engine(Layout(1, 1, 0)) as made:
        return [deepspeed.utils.safe_get_full_fp32_param(p) is None for p in made.module.parameters()]


def test_safe_get_full_knows_nothing_of_stage_0() -> None:
    """So checkpoints look into the engine themselves (homes.py)."""
    assert all(run(1, public_function_at_stage_0)[0])


def adam_steps(zero: int) -> set[float]:
    layout = Layout(1, 1, zero)
    with engine(layout, Recipe(bf16=True)) as made:
        steps(made, layout, 0, 1)
        return {float(state["step"]) for state in made.basic_optimizer.state.values()}


def test_bf16_without_zero_starts_with_a_step_too_many() -> None:
    """FP16_UnfusedOptimizer steps once with zero gradients when it is built: bias correction and weight decay are off
    by one step. A checkpoint of it says so, and every other stage goes on from it as it would itself."""
    assert run(1, adam_steps, 0)[0] == {2.0}
    assert run(1, adam_steps, 2)[0] == {1.0}

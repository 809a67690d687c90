"""Whether a length trains, the part of a rank."""

from __future__ import annotations

from typing import Any

from ulysses_exp.rank import nonfinite
from ulysses_exp.rank.session import Session
from ulysses_exp.rank.step import optimizer_step


def try_length(session: Session) -> dict[str, Any]:
    """The part of a rank: `longest.steps` optimizer steps at `train.seq_len`. Raises ArithmeticError at one that is
    not finite: such a length does not train, whatever memory it takes."""
    session.engine.train()
    losses = []
    for number in range(session.config.longest.steps):
        step = optimizer_step(session, number)
        if step.trouble is not None and session.config.train.on_nonfinite == "stop":
            raise ArithmeticError(nonfinite.words(step.trouble))
        losses.append(step.loss)
    return {"loss": losses}

"""The uninterrupted run, a few steps past its checkpoint: what a reloaded one is compared with."""

from __future__ import annotations

from typing import Any

from ulysses_exp.session import Session
from ulysses_exp.training import optimizer_step


def continuation(session: Session) -> dict[str, Any]:
    """`reload.steps` more optimizer steps of the engine as it stands, or, in a task of its own, from its checkpoint."""
    session.resume(training=True)
    return {"loss": follow(session), "first_step": session.step}


def follow(session: Session) -> list[float]:
    """The losses of the next `reload.steps` optimizer steps."""
    session.engine.train()
    losses = []
    for step in range(session.step, session.step + session.config.reload.steps):
        losses.append(optimizer_step(session, step).loss)
    return losses

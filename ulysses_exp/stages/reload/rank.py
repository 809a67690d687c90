"""Stage `reload`, the part of a rank: open a checkpoint in this layout, prove it, and train on from it.

What a reloaded run is compared with, the uninterrupted one a few steps past its checkpoint, is here as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.session import Session
from ulysses_exp.rank.step import optimizer_step


def reload(session: Session) -> dict[str, Any]:
    """Loads `options["checkpoint"]` into an engine whose weights were drawn from another seed.

    The result is a cell of results.json without `source` and `target`, plus the losses that followed.
    """
    loaded = checkpoints.load(
        session.engine,
        Path(session.task.options["checkpoint"]),
        layout=session.layout,
        trust_pickle=session.task.options["trust_pickle"],
    )
    session.step = loaded.step
    return {
        "route": loaded.route,
        "weights_bit_exact": loaded.weights_bit_exact,
        "optimizer_bit_exact": loaded.optimizer_bit_exact,
        "seconds": loaded.seconds,
        "bytes": loaded.bytes,
        "loss": follow(session),
    }


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

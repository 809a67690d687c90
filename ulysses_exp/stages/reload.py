"""Stage `reload`, the part of a rank: open a checkpoint in this layout, prove it, and train on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulysses_exp import checkpoints
from ulysses_exp.session import Session
from ulysses_exp.stages.continuation import follow


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

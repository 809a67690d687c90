"""Stage `parity`, the part of a rank: optimizer steps whose weights are kept."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file

from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.session import Session
from ulysses_exp.rank.step import optimizer_step


def trajectory(session: Session) -> dict[str, Any]:
    """`parity.steps` optimizer steps; rank 0 leaves the fp32 weights after each as `weights<step>.safetensors`."""
    losses, norms = [], []
    session.engine.train()
    for step in range(session.config.parity.steps):
        result = optimizer_step(session, step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        whole = checkpoints.full_weights(session.engine)
        weights = {name: tensor.clone() for name, tensor in whole if session.rank == 0}
        if session.rank == 0:
            save_file(weights, session.task.results / f"weights{step + 1}.safetensors")
    return {"loss": losses, "grad_norm": norms, "mixers": session.attention.mixers}

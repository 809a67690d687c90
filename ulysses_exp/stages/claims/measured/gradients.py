"""C10: the gradient that an optimizer step applies, seen in the weights."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_exp.rank import checkpoints
from ulysses_exp.stages.claims.measured.attention_calls import Collectives
from ulysses_exp.stages.claims.measured.reference import Reference
from ulysses_exp.stages.claims.measured.subject import Subject


def count(subject: Subject, reference: Reference) -> dict[str, Any]:
    """One SGD step at learning rate 1 without clipping: the weights move by the gradient. Collective over the world.

    Returns:
        `C10`: the `factor` on the true gradient, what is left when it is divided out (`off`, relative), whether weights
        are `equal` on all ranks afterwards, and the `collectives` of the step by operation and ranks.
    """
    before = dict(_weights(subject))
    with Collectives() as collectives:
        subject.step(0)
    after = dict(_weights(subject))
    equal = checkpoints.weights_identical(subject.engine, None)
    along, length, moved = 0.0, 0.0, 0.0
    for name, true in reference.gradient.items():
        applied, true = (before[name] - after[name]).double(), true.double()
        along += float((applied * true).sum())
        length += float((true * true).sum())
        moved += float((applied * applied).sum())
    factor = along / length
    rest = max(0.0, moved - factor * along) ** 0.5  # |applied - factor * true|
    return {
        "C10": {
            "factor": factor,
            "off": rest / max(abs(factor) * length**0.5, 1e-30),
            "equal": equal,
            "world": subject.config.layout.world,
            "collectives": collectives.by_name(),
        }
    }


def _weights(subject: Subject) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in checkpoints.full_weights(subject.engine)]

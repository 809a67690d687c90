"""What decides the weights of attention beside queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How scores are made, and which count.

    Attributes:
        scaling: on the scores; None: 1 / sqrt(head_dim).
        window: a token sees itself and the `window` - 1 tokens before it; None: all before it.
        softcap: scores pass through softcap x tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
        sinks: [heads], a score that every query has beside those of its keys (gpt-oss).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Beyond what every flash kernel computes."""
        return self.softcap is not None or self.sinks is not None

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

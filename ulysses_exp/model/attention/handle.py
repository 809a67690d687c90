"""The handle of a registration: what a caller says of the next forward, and what it may switch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ulysses_exp.model.attention.documents import Documents, documents


@dataclass(frozen=True)
class Announced:
    """What `begin` was told of the next forward."""

    documents: Documents
    position_ids: Tensor  # [batch, seq_len], on the host
    masked: bool


class Ulysses:
    """The handle of a registration.

    Attributes:
        attention: the name of what runs, `auto` resolved; None where the model is left as it is.
        mpu: what `deepspeed.initialize(mpu=...)` takes; None at sp 1.
        disable_in_eval: a model in eval mode runs the core attention on whole sequences, without any collective. May
            be switched between forwards.
        attention_calls: calls of the patched attention function by this model so far.
    """

    def __init__(self, mpu: Any = None, sp: int = 1, disable_in_eval: bool = True, attention: str | None = None):
        self.attention = attention
        self.mpu = mpu
        self.sp = sp
        self.disable_in_eval = disable_in_eval
        self.attention_calls = 0
        self._announced: Announced | None = None

    def begin(self, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Tells what the ranks would otherwise gather: the whole sequences of the next forward. No collective, no
        device sync. Optional; every rank of a sequence-parallel group has to make the call, with the same values.

        Args:
            position_ids: [batch, seq_len] int64 on the host, global positions. A fake tensor counts as plain causal.
            attention_mask: [batch, seq_len], zero at padding; None where nothing is padded.

        Raises:
            ValueError: shapes do not fit, or padding lies inside a document.
        """
        if self.attention is None:
            return
        whole = documents(position_ids, attention_mask)
        self._announced = Announced(whole, position_ids, attention_mask is not None)

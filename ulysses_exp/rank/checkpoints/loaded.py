"""What opening a checkpoint came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that an engine has taken over."""

    route: str  # portable, or direct for DeepSpeed's own files
    step: int
    state: dict[str, Any]  # as it was given to `save`
    seconds: float
    bytes: int  # of the checkpoint's tensors
    weights_bit_exact: bool | None  # the fp32 weights, and those of the forward pass on every rank; None: not known
    optimizer_bit_exact: bool | None

"""What claims are measured on: an engine of one side, with what its users call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

from ulysses_exp.config import Config
from ulysses_exp.stages.claims.measured.attention_calls import AttentionCalls


@dataclass
class Subject:
    """One rank's engine at `config.layout`, upstream's alone or this project's."""

    side: str
    config: Config
    rank: int
    engine: deepspeed.DeepSpeedEngine
    calls: AttentionCalls
    original: Callable[..., Any]  # the attention function that was there before
    direct: UlyssesSPAttentionHF  # constructed around it, with disable_in_eval=True
    step: Callable[[int], None]  # the optimizer step of this number, over the training data
    save: Callable[[Path], None]  # into this folder
    load: Callable[[Path], None]  # from it; raises what the side raises
    #: (checkpoint, room) -> by the way that it was made, what from_pretrained may open, or why there is nothing
    exports: Callable[[Path, Path], dict[str, Path | str]]

    @property
    def slice(self) -> slice:
        """This rank's tokens of a whole sequence."""
        layout = self.config.layout
        tokens = self.config.train.seq_len // layout.sp
        return slice(layout.sp_rank(self.rank) * tokens, (layout.sp_rank(self.rank) + 1) * tokens)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def model(self) -> Any:
        return self.engine.module


def head_size(text: Any) -> int:
    """Of an attention head, by a transformers text configuration."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

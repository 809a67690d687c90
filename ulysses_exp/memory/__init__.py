"""The memory savers of `config.memory`: each trades time for memory and leaves the numbers as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ulysses_exp.config import MemoryConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["apply"]


def apply(model: PreTrainedModel, memory: MemoryConfig) -> None:
    """Changes `model` in place, before `deepspeed.initialize`, so that its training forward holds less.

    Args:
        model: a Hugging Face causal LM. Its weights, outputs and state dict keys stay the same.
        memory: what to switch on; the default switches nothing on.
    """
    if memory.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": memory.checkpointing == "reentrant"})

"""The memory savers of `config.memory`: each trades time for memory and leaves the numbers as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ulysses_exp.config import MemoryConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["apply"]


def apply(model: PreTrainedModel, memory: MemoryConfig) -> None:
    """Changes `model` in place, before `deepspeed.initialize`, so that its training forward holds less.

    Weights and state dict keys stay the same, loss and gradients to rounding. With `memory.tiled_loss` a forward with
    labels returns no logits.

    Args:
        model: a Hugging Face causal LM.
        memory: what to switch on; the default keeps every activation and takes the loss in place.

    Raises:
        ConfigError: the model has not what an option works on.
    """
    from ulysses_exp.model.memory.checkpointing import checkpoint_layers
    from ulysses_exp.model.memory.loss_in_place import take_loss_in_place
    from ulysses_exp.model.memory.tiled_loss import tile_loss
    from ulysses_exp.model.memory.tiled_mlp import tile_mlps

    if memory.loss_in_place:
        take_loss_in_place(model)
    if memory.tiled_mlp:
        tile_mlps(model, memory.tiled_mlp)
    if memory.checkpointing != "none":
        checkpoint_layers(model, reentrant=memory.checkpointing == "reentrant", offload=memory.offload_activations)
    if memory.tiled_loss:
        tile_loss(model, memory.tiled_loss)

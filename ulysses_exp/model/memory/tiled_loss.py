"""Tiled loss: the logits of a few positions at a time, instead of [local sequence, vocabulary] in fp32.

Of ALST (arXiv 2506.13996, section 3.1). DeepSpeed 0.19.8's `TiledFusedLogitsLoss` is not used: it loses what is done to
the loss afterwards (docs/findings.md).

Under ZeRO 3 the head's weight stays gathered from tile to tile as long as it has fewer elements than DeepSpeed's
`stage3_max_reuse_distance` and `stage3_max_live_parameters` (1e9 by default); beyond that each tile gathers it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ulysses_exp.config import ConfigError
from ulysses_exp.config.tiles import tiles_of
from ulysses_exp.model.memory.tile_gradients import TileGradients

IGNORED = -100


def tile_loss(model: PreTrainedModel, tiles: int) -> None:
    """Computes the loss of `model` in tiles along the sequence; the output's `logits` are then None.

    A forward without labels is left alone. Everything that the model does between hidden states and loss (softcapping,
    scaling, its loss function) is the model's own code, run on one tile at a time. The head's gradients are added in
    fp32 (`tile_gradients`).

    Args:
        tiles: their number, or `tile_size.AUTO`.

    Raises:
        ConfigError: the model adds a router's loss, which is not a sum over positions.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError("memory.tiled_loss", "the model adds a router's loss", "set memory.tiled_loss=0")
    forward = model.forward
    body = set(model.base_model.modules())
    head = [module for module in model.modules() if module not in body]

    @functools.wraps(forward)
    def tiled_forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels`, `shift_labels`: [batch, positions], the latter already shifted by one."""
        if labels is None:
            return forward(*args, **kwargs)
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=IGNORED)[..., 1:]
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORED).sum()

        gradients = TileGradients(head)

        def tile_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with _hidden_states(model, hidden), gradients.tile():
                return forward(labels=targets, shift_labels=targets, num_items_in_batch=num_items_in_batch).loss

        outputs = model.base_model(*args, **kwargs)
        number = tiles_of(tiles, shift_labels.shape[1])
        pairs = zip(outputs.last_hidden_state.chunk(number, dim=1), shift_labels.chunk(number, dim=1), strict=True)
        with gradients.first_pass():
            losses = [checkpoint(tile_loss, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        return CausalLMOutputWithPast(loss=torch.stack(losses).sum(), past_key_values=outputs.past_key_values)

    model.forward = tiled_forward


class _Given(torch.nn.Module):
    """A base model that has computed its hidden states already."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


@contextlib.contextmanager
def _hidden_states(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Within, `model` is its head on `hidden`: [batch, positions, hidden size]."""
    modules, name = model._modules, model.base_model_prefix
    base = modules[name]
    modules[name] = _Given(hidden)
    try:
        yield
    finally:
        modules[name] = base

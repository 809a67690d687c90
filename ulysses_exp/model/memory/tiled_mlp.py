"""Tiled MLP: the intermediate activations of a few positions at a time, instead of the whole local sequence's.

Of ALST (arXiv 2506.13996, section 3.1). An MLP works on each position alone, so its tiles along the sequence are
independent: each runs under `torch.utils.checkpoint` and is recomputed when the backward pass comes to it. Their weight
gradients are added in fp32 (`tile_gradients`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ulysses_exp.config import ConfigError
from ulysses_exp.config.tiles import tiles_of
from ulysses_exp.model.memory.tile_gradients import TileGradients


def tile_mlps(model: PreTrainedModel, tiles: int) -> None:
    """Runs the dense MLP of every decoder layer of `model` in tiles along the sequence while it trains.

    Args:
        tiles: their number, or `tile_size.AUTO`.

    Raises:
        ConfigError: a decoder layer has no dense MLP named `mlp`, as transformers' Llama-like models do.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlps: list[Any] = [layer.mlp for layer in layers if hasattr(getattr(layer, "mlp", None), "down_proj")]
    if not mlps or len(mlps) < len(layers):
        raise ConfigError(
            "memory.tiled_mlp", f"{type(model).__name__} has layers without a dense MLP", "set memory.tiled_mlp=0"
        )
    for mlp in mlps:
        mlp.forward = _tiled(mlp, mlp.forward, tiles)


def _tiled(
    mlp: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], tiles: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    @functools.wraps(forward)
    def tiled_forward(x: torch.Tensor) -> torch.Tensor:
        """`x`: [..., positions, hidden]."""
        if not mlp.training:
            return forward(x)
        gradients = TileGradients(mlp.modules())

        def tile_forward(tile: torch.Tensor) -> torch.Tensor:
            with gradients.tile():
                return forward(tile)

        chunks = x.chunk(tiles_of(tiles, x.shape[-2]), dim=-2)
        with gradients.first_pass():
            parts = [checkpoint(tile_forward, tile, use_reentrant=False, preserve_rng_state=False) for tile in chunks]
        return torch.cat(parts, dim=-2)

    return tiled_forward

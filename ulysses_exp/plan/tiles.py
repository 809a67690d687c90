"""Many tiles along the sequence, traced as four: the first, the last two, and all between at once.

A tile takes what its neighbours take, so the memory of a tiled MLP or loss is known from one tile at the beginning of
a pass, two at the end (the second adds to the gradients of the first), and the sizes of all the others' inputs and
outputs. Without this a trace would take time in proportion to the tiles, of which long sequences have hundreds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ulysses_exp.model.memory import tiled_loss, tiled_mlp

_chunk = torch.Tensor.chunk


class _Untraced(torch.autograd.Function):
    """Tiles whose inner workings are not traced: their output, and their input's gradient, have their sizes."""

    @staticmethod
    def forward(ctx: Any, tile: Tensor, scalar: bool) -> Tensor:
        ctx.like = (tile.shape, tile.dtype, tile.device)
        return tile.new_empty((), dtype=torch.float32) if scalar else torch.empty_like(tile)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device), None


def _few(tensor: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """`Tensor.chunk`, with all but the first and the last two in one where there would be more than three."""
    length = tensor.shape[dim]
    size = -(-length // chunks)
    number = -(-length // size)
    if number <= 3:
        return _chunk(tensor, chunks, dim)
    last = length - (number - 1) * size
    tiles = tensor.split([size, (number - 3) * size, size, last], dim)
    tiles[1].untraced = True  # type: ignore[attr-defined]
    return tiles


def _checkpoint(original: Callable[..., Any], *, scalar: bool) -> Callable[..., Any]:
    def run(function: Callable[..., Any], tile: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(tile, "untraced", False):
            return _Untraced.apply(tile, scalar)
        return original(function, tile, *args, **kwargs)

    return run


@contextlib.contextmanager
def few() -> Iterator[None]:
    """Within, the tiled MLP and the tiled loss of `ulysses_exp.model.memory` are traced as described."""
    with (
        patch.object(torch.Tensor, "chunk", _few),
        patch.object(tiled_mlp, "checkpoint", _checkpoint(tiled_mlp.checkpoint, scalar=False)),
        patch.object(tiled_loss, "checkpoint", _checkpoint(tiled_loss.checkpoint, scalar=True)),
    ):
        yield

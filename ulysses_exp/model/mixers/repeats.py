"""Which forward a backward repeats, where layers are recomputed (activation checkpointing).

A mixer is given nothing that tells one forward from another, nor is the attention of some models (Llama 4).
transformers' layers (5.23) run again what they handed to their `_gradient_checkpointing_func`, so that is where a layer
is told which forward it was handed over in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ulysses_exp.model.attention.core import Way


class Repeats:
    """Attributes:
    way: of the forward that is repeated now; None where none is.
    """

    def __init__(self, model: torch.nn.Module):
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.way: Way | None = None

    def follow(self, way: Way) -> None:
        """To be called before each forward: checkpointing may have been switched on since the last one."""
        for layer in self.layers:
            given = vars(layer).get("_gradient_checkpointing_func")
            if given is not None:
                original = given.original if isinstance(given, _Told) else given
                layer._gradient_checkpointing_func = _Told(original, self, way)  # type: ignore[assignment]

    def forget(self) -> None:
        """Puts back what was there."""
        for layer in self.layers:
            given = vars(layer).get("_gradient_checkpointing_func")
            if isinstance(given, _Told):
                layer._gradient_checkpointing_func = given.original  # type: ignore[assignment]


class _Told:
    """A checkpointing function whose layer finds `way` whenever it runs."""

    def __init__(self, original: Callable[..., Any], repeats: Repeats, way: Way):
        self.original, self.repeats, self.way = original, repeats, way

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        repeats, way = self.repeats, self.way

        def told(*args: Any, **kwargs: Any) -> Any:
            before, repeats.way = repeats.way, way
            try:
                return layer(*args, **kwargs)
            finally:
                repeats.way = before

        return self.original(told, *args, **kwargs)

"""Weight gradients of many tiles, added in fp32 and rounded once.

autograd adds what each tile says of a weight in the type of the weight. In bf16 every one of those sums is rounded:
with 128 tiles the gradient is off by four times as much as without tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TileGradients:
    """The sums of one pass through the tiles of `modules`: a buffer in fp32 a weight, made in the backward by the first
    tile and given up as the gradient by the last.

    Weights that are in fp32 already, and those that are not trained, are left alone. A tile's own gradient is rounded
    to the weight's type, as it is without tiles.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        """Args: modules: all that is in a tile; those with weights of their own count."""
        self._modules = [m for m in modules if next(m.parameters(recurse=False), None) is not None]
        self._sums: dict[str, _Sum] = {}
        self._first_pass = True

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around the forward of all tiles. Recomputation calls the same tiles again, later and outside of it."""
        try:
            yield
        finally:
            self._first_pass = False

    @contextlib.contextmanager
    def tile(self) -> Iterator[None]:
        """Around the forward of one tile. The weights are exchanged inside of each module's forward, where ZeRO 3 has
        gathered them."""
        before = [vars(module).get("forward") for module in self._modules]
        for number, module in enumerate(self._modules):
            module.forward = self._with_sums(number, module, module.forward)
        try:
            yield
        finally:
            for module, forward in zip(self._modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _with_sums(self, number: int, module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*args: Any, **kwargs: Any) -> Any:
            trained = {
                name: parameter
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad and parameter.dtype != torch.float32
            }
            for name, parameter in trained.items():
                gradients = self._sums.setdefault(f"{number}.{name}", _Sum())
                gradients.tiles += self._first_pass
                vars(module)[name] = _Summed.apply(parameter, gradients)  # comes before the module's parameters
            try:
                return forward(*args, **kwargs)
            finally:
                for name in trained:
                    del vars(module)[name]

        return summed


class _Sum:
    """Of one weight's gradients."""

    def __init__(self) -> None:
        self.tiles = self.done = 0
        self.buffer: Tensor | None = None

    def add(self, gradient: Tensor | None) -> Tensor | None:
        """Returns the sum with the last tile's, None before."""
        self.done += 1
        if gradient is not None:
            if self.buffer is not None:
                self.buffer += gradient
            else:
                self.buffer = gradient if self.tiles == 1 else gradient.float()
        if self.done < self.tiles:
            return None
        total, self.buffer, self.done = self.buffer, None, 0
        return total


class _Summed(torch.autograd.Function):
    """The weight itself; its gradient goes into a sum. Of all tiles one alone passes a gradient on, so that what waits
    for the weight's gradient (DeepSpeed's reduction) sees one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradients: _Sum) -> Tensor:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        # in fp32: autograd rounds to the weight's type when the tile's own gradient is no longer held
        return ctx.gradients.add(grads[0]), None

"""Weight gradients of tiles in bf16 are as good as those of the whole sequence, whatever the number of tiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch
from memory_ranks import new_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ulysses_exp.config import MemoryConfig
from ulysses_exp.model import memory
from ulysses_exp.model.memory.tile_gradients import TileGradients

LENGTH = 1024
TILES = (1, 8, 128)
Gradients = dict[str, torch.Tensor]


def model_with(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A one-layer model with the same weights in every type: those of bf16."""
    model = new_model("tiny_llama", "none", num_hidden_layers=1).to(torch.bfloat16).to(dtype)
    memory.apply(model, MemoryConfig(name="test", **({"loss_in_place": False} | options)))
    return model


def of_mlp(model: PreTrainedModel) -> Gradients:
    """By the sum over a fixed random direction of the output."""
    mlp = model.model.layers[0].mlp
    random = torch.Generator().manual_seed(1)
    dtype = mlp.down_proj.weight.dtype
    x, direction = (torch.randn(1, LENGTH, 128, generator=random).to(torch.bfloat16).to(dtype) for _ in range(2))
    (mlp(x.requires_grad_()) * direction).sum().backward()
    return {name: p.grad for name, p in mlp.named_parameters()}


def of_head(model: PreTrainedModel) -> Gradients:
    """Every target is the same token, so that no part of its gradient cancels another: a sum's roundings all show."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (1, LENGTH), generator=random)
    labels = torch.full_like(tokens, 7)
    model(
        input_ids=tokens, labels=labels, shift_labels=labels, num_items_in_batch=LENGTH, use_cache=False
    ).loss.backward()
    return {"lm_head": model.lm_head.weight.grad}


def error(gradients: Gradients, right: Gradients) -> float:
    return max(((gradients[n].double() - right[n]).norm() / right[n].norm()).item() for n in right)


@pytest.mark.parametrize(("saver", "of"), [("tiled_mlp", of_mlp), ("tiled_loss", of_head)])
def test_as_exact_in_bf16_as_without_tiles(saver: str, of: Callable[[PreTrainedModel], Gradients]) -> None:
    right = of(model_with(torch.float64))
    untiled = error(of(model_with(torch.bfloat16)), right)
    assert untiled < 5e-3
    for tiles in TILES:
        tiled = error(of(model_with(torch.bfloat16, **{saver: tiles})), right)
        assert tiled <= 1.2 * untiled, f"{tiled:.1e} in {tiles} tiles, {untiled:.1e} without"


def test_fp32_is_left_alone() -> None:
    """Bit for bit what autograd makes of checkpointed tiles."""
    tiled, plain = model_with(torch.float32, tiled_mlp=5), model_with(torch.float32)
    mlp = plain.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.cat([checkpoint(forward, t, use_reentrant=False) for t in x.chunk(5, -2)], -2)
    gradients, right = of_mlp(tiled), of_mlp(plain)
    assert all(torch.equal(gradients[name], right[name]) for name in right)


@pytest.mark.parametrize("outer", [None, True, False], ids=["kept", "reentrant", "non_reentrant"])
def test_one_gradient_a_weight_reaches_the_leaf(outer: bool | None) -> None:
    """Also where the tiles lie in a recomputed layer, and in a second backward; a frozen weight gets none."""
    mlp = model_with(torch.bfloat16, tiled_mlp=4).model.layers[0].mlp
    mlp.up_proj.weight.requires_grad_(False)
    seen = []
    mlp.down_proj.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    x = torch.randn(1, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        (mlp(x) if outer is None else checkpoint(mlp, x, use_reentrant=outer)).sum().backward()
    assert mlp.up_proj.weight.grad is None
    assert [gradient.dtype for gradient in seen] == [torch.bfloat16] * 2
    assert torch.equal(seen[0], seen[1])
    assert seen[0].abs().sum() > 0


def test_a_graph_can_be_used_again() -> None:
    mlp = model_with(torch.bfloat16, tiled_mlp=4).model.layers[0].mlp
    output = mlp(torch.randn(1, 64, 128, dtype=torch.bfloat16)).sum()
    first, second = (torch.autograd.grad(output, mlp.gate_proj.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_held_between_steps() -> None:
    linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    gradients = TileGradients([linear])
    with gradients.first_pass():
        parts = []
        for tile in torch.randn(4, 8, dtype=torch.bfloat16).chunk(4):
            with gradients.tile():
                parts.append(linear(tile))
    assert "forward" not in vars(linear)
    torch.cat(parts).sum().backward()
    assert [total.buffer for total in gradients._sums.values()] == [None, None]
    assert linear.bias.grad.unique().tolist() == [4.0]

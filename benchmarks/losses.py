"""The ways from hidden states to the loss and back: time, peak memory, and how far from fp32 numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ulysses_exp.config import MemoryConfig
from ulysses_exp.model import memory
from ulysses_exp.rank.metrics.memory import peak, reset_peak

IGNORED = -100
TILES = 8
FEW_LOGITS = 2**28  # up to so many, a result is compared with fp32


class Missing(Exception):
    """This torch has not got it."""


def _transformers(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """[1, tokens, hidden], labels that are shifted already -> the mean loss."""
    return lambda hidden, labels: model(inputs_embeds=hidden, labels=labels, shift_labels=labels).loss


def _saved_by(**savers: Any) -> Callable[[PreTrainedModel], Callable[[Tensor, Tensor], Tensor]]:
    def way(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
        memory.apply(model, MemoryConfig("", **savers))
        return _transformers(model)

    return way


def _torch(**options: Any) -> Callable[[PreTrainedModel], Callable[[Tensor, Tensor], Tensor]]:
    """torch's own, which takes head and loss together; without `options` its reference."""

    def way(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
        if not hasattr(F, "linear_cross_entropy"):
            raise Missing(f"not in torch {torch.__version__}")
        chosen = torch.nn.LinearCrossEntropyOptions(**options) if options else None

        def loss(hidden: Tensor, labels: Tensor) -> Tensor:
            states = model.model(inputs_embeds=hidden).last_hidden_state[0]
            return F.linear_cross_entropy(states, model.lm_head.weight, labels[0], ignore_index=IGNORED, options=chosen)

        return loss

    return way


WAYS: dict[str, Callable[[PreTrainedModel], Callable[[Tensor, Tensor], Tensor]]] = {
    "transformers": _transformers,
    "in place": _saved_by(),
    f"in place, {TILES} tiles": _saved_by(tiled_loss=TILES),
    "linear_cross_entropy": _torch(),
    "linear_cross_entropy, chunked": _torch(acc_policy="auto"),
    "linear_cross_entropy, chunked, accurate": _torch(acc_policy="accurate"),
}


def measure(
    way: str, *, tokens: int, hidden: int, vocabulary: int, dtype: str, device: str, rounds: int
) -> dict[str, Any]:
    """One way in this process. On CPU the peak is the process's, so each way needs one of its own.

    Returns:
        `seconds` of forward and backward, the least of `rounds`; `more_bytes`: peak beyond weights, inputs and
        gradients; `loss`, `gradient`, `weight`: relative to fp32 by transformers.

    Raises:
        Missing: this torch has not got it.
    """
    kind, place = getattr(torch, dtype), torch.device(device)
    model, states, labels = _made(tokens, hidden, vocabulary, kind, place)
    right = None
    if tokens * vocabulary <= FEW_LOGITS:
        right = _numbers(_transformers(model.float()), states.float(), labels, model)
    model, states, labels = _made(tokens, hidden, vocabulary, kind, place)
    loss = WAYS[way](model)
    found = _numbers(loss, states, labels, model)  # gradients are there now, and stay
    took: list[float] = []
    for _ in range(rounds):
        reset_peak(place)
        before, began = peak(place), time.perf_counter()
        _numbers(loss, states, labels, model)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
        more = peak(place) - before
    row: dict[str, Any] = {"seconds": min(took), "more_bytes": more}
    if right is not None:
        for name, x, y in zip(("loss", "gradient", "weight"), found, right, strict=True):
            row[name] = float(torch.linalg.vector_norm(x.float() - y) / torch.linalg.vector_norm(y))
    return row


def _made(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model that is its norm and its head, hidden states, and labels of which every tenth is ignored."""
    torch.manual_seed(0)
    architecture = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=0, num_attention_heads=1, intermediate_size=8
    )
    with torch.device(device):
        model = LlamaForCausalLM(architecture).to(dtype)
        model.model.embed_tokens = torch.nn.Embedding(1, 1)  # not used
        states = torch.randn(1, tokens, hidden, dtype=dtype)
        labels = torch.randint(vocabulary, (1, tokens))
        labels[:, ::10] = IGNORED
    return model, states, labels


def _numbers(
    loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, labels: Tensor, model: PreTrainedModel
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient by the states and by the head's weight."""
    leaf = states.detach().requires_grad_()
    model.lm_head.weight.grad = None
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad, model.lm_head.weight.grad

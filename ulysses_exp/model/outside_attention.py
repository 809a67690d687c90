"""Whether a type of model can be right with its sequences cut into slices, tried on a tiny copy of it.

Ulysses gives each rank a slice, and lets the tokens of different slices see each other in the attention function alone.
So that function is replaced by one that gives each token its own value, and the model is run on whole sequences and on
slices of them: a model whose tokens meet nowhere else, and which takes positions from `position_ids`, gives the same.
Whoever takes the name of an attention function and never calls it, mixes tokens in a convolution or a scan, counts
positions itself, or looks for the longest position of a batch, does not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.tiny import built, shrunk, tiny

_NAME = "each_token_alone"  # no other name in it, such as sdpa: transformers looks for these
_TOKENS, _FIRST, _CHANGED = 48, 5, 20  # of the sequence; the smallest id that means nothing special; the one changed
_TOLERANCE = 1e-4  # of the largest logit; what fp32 rounds is some 1e-6, what a token adds to others above 1e-3


@dataclass
class Calls:
    """What reached the attention function.

    Attributes:
        modules: the attention modules that called it, once each.
        arguments: names of what they passed besides q, k, v and a mask, where it was not None.
        widths: pairs of q's and v's width.
    """

    modules: set[int] = field(default_factory=set)
    arguments: set[str] = field(default_factory=set)
    widths: set[tuple[int, int]] = field(default_factory=set)


def mixes_outside_attention(model: str | PretrainedConfig) -> str | None:
    """Why slices of a sequence would not give what the whole gives; None where nothing was found.

    A type that no tiny copy can be made of is not judged. Layers that see tokens of other slices by other means than
    the attention function (a convolution with its halo exchanged) count as mixing all the same.

    Args:
        model: a type of model, taken with its defaults, or a configuration.
    """
    config = model if isinstance(model, PretrainedConfig) else None
    kind = model if isinstance(model, str) else str(config and config.model_type)
    return _judged(kind, None if config is None else _Hashed(config))


class _Hashed:
    """A configuration that is the same key as another with the same tiny copy."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self.key = (type(config), config.to_json_string())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


@functools.cache  # in this process: what it depends on, the class and the library's version, stays the same in it
def _judged(kind: str, given: _Hashed | None) -> str | None:
    random = torch.get_rng_state()
    try:
        with each_token_alone() as calls:
            try:
                small = tiny(kind) if given is None else shrunk(given.config)
                model = built(small, _NAME)
            except KeyError as error:
                return f"{kind} keeps its own attention code" if _NAME in str(error) else None
            except Exception:
                return None
            return why_slices_differ(model, calls)
    finally:
        torch.set_rng_state(random)


def why_slices_differ(model: PreTrainedModel, calls: Calls) -> str | None:
    """Runs a tiny model, built with the attention function of `each_token_alone`, on a sequence and its two halves."""
    kind = model.config.model_type
    ids = torch.randint(_FIRST, 90, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    half = _TOKENS // 2
    try:
        whole = logits(model, ids, 0)
        halves = torch.cat([logits(model, ids[:, :half], 0), logits(model, ids[:, half:], half)])
        changed = ids.clone()
        changed[0, _CHANGED] = _FIRST + (changed[0, _CHANGED] - _FIRST + 7) % 80
        moved = _differ(whole, logits(model, changed, 0))
    except Exception as error:
        return _cannot_run(model, error)
    moved[_CHANGED] = False
    if moved.any():
        if not calls.modules:
            return f"{kind} keeps its own attention code: it never calls the attention function it is given"
        return f"{kind} mixes tokens outside of attention"
    if _differ(whole, halves).any():
        return f"{kind} counts positions itself, from the first token of a slice"
    return None


def logits(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """[tokens, vocabulary] of a slice that begins at position `first`."""
    arguments: dict[str, Any] = {"use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = torch.arange(first, first + ids.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits[0]


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Of each token, whether its logits do."""
    return (one - other).abs().amax(-1) > _TOLERANCE * one.abs().max()


def _cannot_run(model: PreTrainedModel, error: Exception) -> str | None:
    return f"{model.config.model_type} reads attention masks outside of the attention function"


@contextmanager
def each_token_alone() -> Iterator[Calls]:
    """Registers an attention function that gives each token a function of its own q, k and v, and no mask."""
    calls = Calls()

    def alone(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        calls.modules.add(id(module))
        calls.arguments.update(name for name, given in kwargs.items() if given is not None)
        calls.widths.add((query.shape[-1], value.shape[-1]))
        heads = query.shape[1] // key.shape[1]
        # rotated queries and keys, each by itself: their product would not show by how much
        own = torch.tanh(query[..., ::2].sum(-1)) + torch.tanh(key[..., ::2].sum(-1)).repeat_interleave(heads, 1)
        out = value.repeat_interleave(heads, 1) * (1 + own[..., None] / 4)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = alone
    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = lambda *args, **kwargs: None
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME], ALL_MASK_ATTENTION_FUNCTIONS[_NAME]

"""A name of its own for the attention of one model, in transformers' tables and in the model's configuration.

transformers asks no `_supports_*` flag of a name that it does not know (5.23, `get_correct_attn_implementation`), so
models that refuse sdpa run as well; no other model of the process has the name. It must not contain `sdpa`, `flash` or
`flex_attention`, which transformers looks for in names.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_numbers = itertools.count(1)


@contextmanager
def own_name(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[str]:
    """Within, `model` calls `attention` and `mask`; its configuration is as it was on exit."""
    name = f"ulysses_{next(_numbers)}"
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield name
    finally:
        for config, old in before:
            config._attn_implementation_internal = old
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every configuration that a module of the model reads its attention from, once."""
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    return list(found.values())


def interchangeable(model: PreTrainedModel) -> bool:
    """Whether the model asks transformers' table for its attention, rather than bringing its own."""
    return bool(model._can_set_attn_implementation())


def transformers_own(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function of that name; `eager` is each modeling file's own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return found
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return own

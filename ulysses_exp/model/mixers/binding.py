"""Which modules of a model mix tokens and are served here, and how the functions they call are replaced.

A mixer calls its convolution and its scan by names of its modeling file. Each instance gets a forward of its own: the
code of its class with globals in which those names are others. The class, the file and all other models stay as they
are, and so does the instance once the context is left.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ulysses_exp.config.model_rules import SHARDED_LAYERS, WITHOUT_MIXING
from ulysses_exp.model.attention.core import Way
from ulysses_exp.model.mixers import convolution, delta_rule, mamba1, mamba2, rg_lru

WayOf = Callable[[torch.nn.Module], Way | None]

_AROUND: dict[str, Callable[..., Callable[..., Any]]] = {
    "causal_conv1d_fn": convolution.around,
    "torch_chunk_gated_delta_rule": delta_rule.around,
    "chunk_kimi_delta_attention": delta_rule.around,
    "mamba2_chunk_scan": mamba2.around,
    "mamba2_split_conv1d_scan_combined": mamba2.fused,
    "mamba_selective_scan": mamba1.around,
    "mamba_inner_fn": mamba2.fused,
}


def mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that are served here."""
    return [m for m in model.modules() if _called(m) or rg_lru.is_unit(m)]


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that ask transformers' table for their attention."""
    return [m for m in model.modules() if "ALL_ATTENTION_FUNCTIONS" in _code(m).co_names]


def why_not_served(model: PreTrainedModel) -> str | None:
    """Why a model with mixers cannot be served; None where nothing is known against it.

    Every decoder layer has a mixer or attention that is known, or is configured to have neither; one whose type is not
    attention's has a mixer; and no convolution is beside those of a mixer.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    types_of = list(getattr(config, "layer_types", None) or [])
    named = types_of if len(types_of) == len(layers) else [None] * len(layers)
    for i, (layer, name) in enumerate(zip(layers, named, strict=True)):
        mixing = mixers(layer)
        if not mixing and name not in WITHOUT_MIXING and (not attentions(layer) or name not in {*SHARDED_LAYERS, None}):
            return f"layer {i} of {kind} ({name or 'of no type'}) mixes tokens in a way that is not known here"
        known = {id(m) for mixer in mixing for m in mixer.modules()}
        for place, m in layer.named_modules():
            if isinstance(m, torch.nn.Conv1d) and id(m) not in known:
                return f"layer {i} of {kind} has a convolution, {place}, that is not known here"
    return None


@contextmanager
def bound(model: PreTrainedModel, way_of: WayOf) -> Iterator[None]:
    """Within, the mixers of `model` ask `way_of(mixer)` how each forward runs.

    Raises:
        ValueError: somebody else has given a mixer a forward of its own.
    """
    replaced: list[tuple[torch.nn.Module, str]] = []
    try:
        for mixer in mixers(model):
            for module, name, function in _replacements(mixer, way_of):
                if name in vars(module):
                    raise ValueError(f"{type(module).__name__}.{name} is replaced already; set sp.size=1")
                setattr(module, name, function)
                replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)


def _replacements(mixer: torch.nn.Module, way_of: WayOf) -> Iterator[tuple[torch.nn.Module, str, Callable[..., Any]]]:
    def way() -> Way | None:
        return way_of(mixer)

    if rg_lru.is_unit(mixer):
        conv, unit = cast(torch.nn.Conv1d, mixer.conv_1d), cast(Any, mixer.rg_lru)
        yield conv, "forward", rg_lru.convolution_around(conv, way)
        yield unit, "_rnn_scan", rg_lru.around(unit._rnn_scan, way)
        return
    forward = inspect.unwrap(type(mixer).forward)
    others = {name: _AROUND[name](forward.__globals__[name], way) for name in _called(mixer)}
    own = types.FunctionType(
        forward.__code__, {**forward.__globals__, **others}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    yield mixer, "forward", types.MethodType(own, mixer)


def _called(module: torch.nn.Module) -> list[str]:
    """The names that the forward of `module` calls and that are replaced here."""
    forward = inspect.unwrap(type(module).forward)
    return [name for name in _code(module).co_names if name in _AROUND and name in forward.__globals__]


def _code(module: torch.nn.Module) -> types.CodeType:
    code: types.CodeType = inspect.unwrap(type(module).forward).__code__
    return code

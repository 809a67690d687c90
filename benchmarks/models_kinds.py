"""What kinds of layers a type of model has, read from its tiny copy and from what reaches its attention function."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import nn

from ulysses_exp.model.outside_attention import each_token_alone, logits
from ulysses_exp.model.tiny import built, tiny

#: Names of modules that mix tokens without attention.
_LINEAR = re.compile(
    r"mamba|deltanet|lightning|recurrent(?!gemma)|rwkv|xlstm|mlstm|linearattention|shortconv|ssm|kda", re.I
)
_ARGUMENTS = {"s_aux": "sinks", "sinks": "sinks", "softcap": "softcap", "position_bias": "position bias"}


def kinds_of_layers(model_type: str) -> list[str]:
    """In words, sorted."""
    config: Any = tiny(model_type).get_text_config(decoder=True)
    found = {_said(kind) for kind in getattr(config, "layer_types", None) or ()}
    with each_token_alone() as calls, contextlib.suppress(Exception):
        model = built(tiny(model_type), calls.name)
        logits(model, torch.arange(5, 53)[None], 0)
    found |= {_ARGUMENTS[name] for name in calls.arguments if name in _ARGUMENTS}
    if "sliding_window" in calls.arguments:
        found.add("windows")
    if calls.modules:
        found.add("attention")
    if any(q != v for q, v in calls.widths):
        found.add("q and v of other width")
    shape = built(tiny(model_type))
    if any(_LINEAR.search(type(module).__name__) or isinstance(module, nn.Conv1d) for module in shape.modules()):
        found.add("linear")
    if any("expert" in name for name, _ in shape.named_modules()):
        found.add("experts")
    return sorted(found)


def _said(kind: str) -> str:
    for part, word in (("sliding", "windows"), ("chunked", "chunks"), ("full", "attention"), ("linear", "linear"),
                       ("conv", "linear"), ("indexed", "chosen keys"), ("compressed", "compressed keys")):  # fmt: skip
        if part in kind:
            return word
    return kind

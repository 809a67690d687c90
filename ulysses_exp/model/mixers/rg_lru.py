"""The real-gated linear recurrent unit of Griffin and RecurrentGemma (arXiv 2402.19427).

What is exchanged: all channels of a slice for some channels of the whole sequence (input and gate; where positions
start anew goes to every rank), and the output back. Exact, because the recurrence is one of each channel by itself,
h = a h + x; the gates were computed token by token before, with all channels. Its convolution is as in `convolution`.

Documents: each starts from an empty state (`by_document`), whatever its first position is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ulysses_exp.model.attention.core import Way
from ulysses_exp.model.mixers import convolution
from ulysses_exp.model.mixers.by_document import by_document
from ulysses_exp.model.mixers.exchange import everywhere, own, to_heads, to_tokens


def is_unit(module: torch.nn.Module) -> bool:
    """Whether `module` is a layer around an RG-LRU as transformers' RecurrentGemma has it."""
    return hasattr(getattr(module, "rg_lru", None), "_rnn_scan") and isinstance(
        getattr(module, "conv_1d", None), torch.nn.Conv1d
    )


def around(original: Callable[..., Any], way_of: Callable[[], Way | None]) -> Callable[..., Any]:
    """What takes the place of `_rnn_scan`: input and gate [batch, tokens, channels], reset [batch, tokens, 1]."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rnn_scan(
        hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, recurrent_states: Any, **kwargs: Any
    ) -> Any:
        way = way_of()
        if way is None or way.untouched:
            return original(hidden_states, recurrent_gate, reset, recurrent_states, **kwargs)
        if recurrent_states is not None:
            raise ValueError("a KV cache in packed documents or under sequence parallelism; set use_cache=False")

        def scan(x: Tensor, gate: Tensor, reset: Tensor) -> Tensor:
            out: Tensor = original(x, gate, reset.bool(), None, **kwargs)[0]
            return out

        assert way.plan is not None
        whole, group = way.plan.documents, way.group
        reset = reset.to(hidden_states.dtype).expand(*hidden_states.shape[:2], -1)
        if group is None:
            return by_document(scan, (hidden_states, recurrent_gate, reset), whole), None
        sp = torch.distributed.get_world_size(group)
        mine = own(hidden_states.shape[2], sp)
        x, gate, reset = to_heads((hidden_states, recurrent_gate, reset), (mine, mine, everywhere(1, sp)), group)
        out = by_document(scan, (x, gate, reset), whole) if x.shape[2] else x
        return to_tokens(out, mine, group), None

    return rnn_scan


def convolution_around(conv: torch.nn.Conv1d, way_of: Callable[[], Way | None]) -> Callable[[Tensor], Tensor]:
    """What takes the place of the forward of `conv`, which pads both sides; its caller drops what is too much."""
    forward = conv.forward

    def original(x: Tensor, weight: Tensor) -> Tensor:
        return forward(x)[..., : x.shape[-1]]

    run = convolution.around(original, way_of)
    return lambda x: run(x, conv.weight)

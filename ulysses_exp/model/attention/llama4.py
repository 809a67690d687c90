"""Llama 4, the one causal LM of transformers (5.23) whose attention counts positions itself.

Its layers without rotary embedding scale a query by log1p(floor((place + 1) / floor_scale)) x attn_scale + 1
(modeling_llama4.py, `Llama4TextAttention.forward`), with places counted from 0 in what a rank holds. Its chunked layers
are told of their chunks by the mask alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scales_queries(module: torch.nn.Module) -> bool:
    """Whether this layer has scaled its queries by places that it counts itself."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def rescaled(module: torch.nn.Module, query: Tensor, places: Tensor) -> Tensor:
    """`query`, [batch, heads, tokens, dim], scaled for `places`, [batch, tokens], each counted in its own document.

    transformers counts a packed document's places from the start of the row, and padding as well; a document would not
    be what it is alone.
    """
    counted = torch.arange(query.shape[2], device=query.device)

    def scale(place: Tensor) -> Tensor:
        steps = torch.floor((place.float() + 1.0) / module.floor_scale)  # type: ignore[operator]
        return torch.log1p(steps) * module.attn_scale + 1.0  # type: ignore[operator]

    return query * (scale(places) / scale(counted))[:, None, :, None].to(query.dtype)


def chunk(module: torch.nn.Module) -> int | None:
    """Tokens of a chunk, beyond which a layer does not see; None where it is not chunked."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types and index is not None and types[index] == "chunked_attention":
        return int(config.attention_chunk_size)  # type: ignore[union-attr]
    return None

"""A tiny model from its configuration, with parameters that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_MATRIX, _VECTOR = 0.1, 0.1  # standard deviations of what is added to a parameter


def built(
    config: PretrainedConfig,
    attention: str | None = None,
    kind: type[PreTrainedModel] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal LM in fp32 and in training mode, the same for the same seed.

    No parameter keeps a special initial value: a bias of zero, a norm of one or a closed gate would hide what depends
    on it. Neither do buffers that are saved and hold zeros, such as a router's correction.

    Args:
        attention: transformers' name of the attention function; None: sdpa where the type has it, else eager.
        kind: the class of the model; None: the causal LM that transformers has for the configuration.

    Raises:
        Exception: whatever the model's class says of its configuration.
    """
    torch.manual_seed(seed)
    model = _model(config, attention, kind)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            size = _MATRIX if parameter.dim() > 1 else _VECTOR
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))
        kept = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point() and not buffer.any():
                buffer.add_(_VECTOR * torch.randn(buffer.shape, generator=noise))
    return model.train()


def _model(config: PretrainedConfig, attention: str | None, kind: type[PreTrainedModel] | None) -> PreTrainedModel:
    def make(name: str) -> Any:
        if kind is not None:
            return kind._from_config(config, attn_implementation=name, dtype=torch.float32)
        return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32)

    if attention is not None:
        return make(attention)
    try:
        return make("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return make("eager")

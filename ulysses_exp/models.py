"""From configuration to Hugging Face model."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ulysses_exp.config import Config, ConfigError


def pretrained_config(config: Config) -> PretrainedConfig:
    """The transformers configuration of the model, its attention implementation set to `sp.attention`."""
    model = config.model
    if model.name_or_path is None:
        arguments = dict(model.architecture)
        return AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    try:
        return AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        problem = f"no model in {model.name_or_path} ({str(error).splitlines()[0]})"
        raise ConfigError("model.name_or_path", problem, "set a local folder or a hub name") from error


def build(config: Config, seed: int | None = None) -> PreTrainedModel:
    """The model in fp32 (the masters of bf16 are made of it), the same weights on every rank.

    Args:
        seed: for random weights; null takes the configuration's.
    """
    torch.manual_seed(config.seed if seed is None else seed)
    architecture = pretrained_config(config)
    arguments = {"attn_implementation": config.sp.attention, "dtype": torch.float32}
    try:
        if config.model.name_or_path is not None and config.model.pretrained:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.name_or_path,
                config=architecture,
                trust_remote_code=config.model.trust_remote_code,
                **arguments,
            )
        else:
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.model.trust_remote_code, **arguments
            )
    except OSError as error:
        problem = str(error).splitlines()[0]
        instead = "set a folder or hub name that holds weights, or model.pretrained=false"
        raise ConfigError("model.name_or_path", problem, instead) from error
    except (ImportError, ValueError) as error:
        if "attn" not in str(error).lower() and "attention" not in str(error).lower():
            raise
        raise ConfigError("sp.attention", str(error).splitlines()[0], "set sp.attention=sdpa") from error
    model.train()
    return model


def describe(config: Config, architecture: PretrainedConfig, parameters: int) -> dict[str, int | str]:
    """The `model` entry of results.json; `parameters` counts tied ones once."""
    text = architecture.get_text_config()
    return {
        "name": config.model.name if config.model.name_or_path is None else config.model.name_or_path,
        "parameters": parameters,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "attention": config.sp.attention,
    }

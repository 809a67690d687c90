"""From configuration to Hugging Face model."""

from __future__ import annotations

import contextlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ulysses_exp.config import Config, ConfigError, check_objective


def pretrained_config(config: Config) -> PretrainedConfig:
    """The transformers configuration of the model, its attention implementation set to `sp.attention`."""
    model = config.model
    if model.name_or_path is None:
        arguments = dict(model.architecture)
        return AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    try:
        found = AutoConfig.from_pretrained(
            model.name_or_path, trust_remote_code=model.trust_remote_code, **model.architecture
        )
    except (OSError, ValueError) as error:
        problem = f"no model in {model.name_or_path} ({str(error).splitlines()[0]})"
        raise ConfigError("model.name_or_path", problem, "set a local folder or a hub name") from error
    if getattr(found, "quantization_config", None) is not None:
        problem = f"{model.name_or_path} is quantized, which needs code of its own and does not train"
        raise ConfigError("model.name_or_path", problem, "set a model in full precision")
    return found


def build(config: Config, seed: int | None = None, rank: int = 0) -> PreTrainedModel:
    """The model in host memory, its parameters in the type that it trains in; on rank 0 with its weights.

    The other ranks get theirs from rank 0 with the engine (`training.build_engine`). Until then they are memory that
    nothing has been written to, of which the system gives none: a node holds a model once, not once a rank.

    Buffers stay as transformers makes them: a rotary embedding's frequencies in bf16 would turn the tokens of a long
    sequence by wrong angles.

    Args:
        seed: for random weights; null takes the configuration's.
    """
    seed = config.seed if seed is None else seed
    torch.manual_seed(seed)
    with contextlib.nullcontext() if rank == 0 else no_init_weights():
        model = _built(config, with_weights=rank == 0)
    if rank:
        model.tie_weights(recompute_mapping=False)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype) if rank == 0 else torch.empty_like(parameter.data, dtype=dtype)
    model.train()
    torch.manual_seed(seed)  # rank 0 has drawn the weights, the others have not
    return model


def _built(config: Config, with_weights: bool) -> PreTrainedModel:
    """In fp32, pretrained where so configured unless `with_weights` is False."""
    architecture = pretrained_config(config)
    check_objective(config, architecture.get_text_config().to_dict())  # with the defaults of its type
    arguments = {"attn_implementation": config.sp.attention, "dtype": torch.float32}
    try:
        if config.model.name_or_path is not None and config.model.pretrained and with_weights:
            return AutoModelForCausalLM.from_pretrained(
                config.model.name_or_path,
                config=architecture,
                trust_remote_code=config.model.trust_remote_code,
                use_safetensors=True,  # never a pickle
                **arguments,
            )
        return AutoModelForCausalLM.from_config(
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

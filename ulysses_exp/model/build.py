"""From configuration to Hugging Face model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ulysses_exp.config import Config, ConfigError, check_objective


def pretrained_config(config: Config) -> PretrainedConfig:
    """The transformers configuration of the model."""
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
    """The model in host memory, in fp32; on rank 0 with its weights.

    The other ranks get theirs from rank 0 with the engine (`rank.engine.build_engine`). Until then they are memory that
    nothing has been written to, of which the system gives none: a node holds a model once, not once a rank.

    Args:
        seed: for random weights; null takes the configuration's.
    """
    seed = config.seed if seed is None else seed
    torch.manual_seed(seed)
    with contextlib.nullcontext() if rank == 0 else no_init_weights():
        model = _built(config, with_weights=rank == 0)
    if rank:
        model.tie_weights(recompute_mapping=False)
    model.train()
    torch.manual_seed(seed)  # rank 0 has drawn the weights, the others have not
    return model


def _built(config: Config, with_weights: bool) -> PreTrainedModel:
    """In fp32, pretrained where so configured unless `with_weights` is False."""
    architecture = pretrained_config(config)
    check_objective(config, architecture.get_text_config().to_dict())  # with the defaults of its type
    # `ulysses` replaces what transformers takes by itself: sdpa, or eager where the model has no sdpa
    known = config.sp.attention in ("auto", "sdpa", "transformers")
    arguments = {"attn_implementation": None if known else config.sp.attention, "dtype": torch.float32}
    try:
        if config.model.name_or_path is not None and config.model.pretrained and with_weights:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                config.model.name_or_path,
                config=architecture,
                trust_remote_code=config.model.trust_remote_code,
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be refused below, by name
                **arguments,
            )
            model, report = opened
            check_weights(config, model, report)
            return model
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


def check_weights(config: Config, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises ConfigError where the pretrained weights are not all, or not only, those of the model, or not finite.

    transformers draws what is missing at random, passes over what is left, and says so in a log. What transformers
    expects to be missing or left over, such as tied weights, is in no list of the report.

    Args:
        report: the `output_loading_info` of `from_pretrained`.
    """
    place = config.model.name_or_path
    spoiled = [n for n, p in model.named_parameters() if not math.isfinite(torch.linalg.vector_norm(p.data, math.inf))]
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
    for names, problem, remedy in (
        (mismatched, "have another shape than the model's", "draw them at random"),
        (report["missing_keys"], "are missing", "draw them at random"),
        (report["unexpected_keys"], "belong to no part of the model", "pass over them"),
        (spoiled, "hold nan or infinity", "train with them"),
    ):
        wrong = sorted(n for n in map(str, names) if not any(fnmatch(n, p) for p in config.model.allow_missing))
        if wrong:
            allowed = wrong[0] + (",..." if len(wrong) > 1 else "")
            raise ConfigError(
                "model.name_or_path",
                f"{place}: {len(wrong)} of its weights {problem}, first {wrong[0]}",
                f"set another folder, or model.allow_missing=[{allowed}] to {remedy}",
            )


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

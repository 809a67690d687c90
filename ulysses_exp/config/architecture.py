"""What is known of the configured model without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_exp.config import stages
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config


def architecture(config: Config) -> dict[str, Any]:
    """The model's configuration as far as it can be read without transformers; only overrides for a name on a hub."""
    model = config.model
    if model.name_or_path is None:
        return dict(model.architecture)
    path = Path(model.name_or_path).expanduser() / "config.json"
    try:
        saved = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        saved = str(error)
    if not isinstance(saved, dict):
        problem = f"{path} is no model's configuration"
        raise ConfigError("model.name_or_path", problem, "set a folder whose config.json is one, or a hub name")
    return saved | model.architecture


def text_architecture(config: Config) -> dict[str, Any]:
    """`architecture` of the part that reads text, where the model has others."""
    known = architecture(config)
    text = known.get("text_config", known)
    return text if isinstance(text, dict) else known


def heads(config: Config) -> tuple[int, int] | None:
    """(query heads, KV heads) where the architecture tells, else None."""
    known = text_architecture(config)
    query = known.get("num_attention_heads")
    kv = known.get("num_key_value_heads") or query
    return (query, kv) if isinstance(query, int) and isinstance(kv, int) else None  # some have a number for each layer


#: Settings of heads that a causal LM does not have.
_NOT_OF_THE_LM = ("classifier_", "summary_")


def check_objective(config: Config, known: Mapping[str, Any]) -> None:
    """Raises ConfigError where a model with the settings `known` trains on something that depends on the layout.

    A router's loss is no sum over tokens: ranks and micro batches would each add their own. Dropout draws other random
    numbers in every layout.
    """
    if known.get("output_router_logits"):
        raise ConfigError(
            "model.architecture.output_router_logits",
            "a router's loss is not the mean over target tokens",
            "set +model.architecture.output_router_logits=false",
        )
    if not any(stage.trains for stage in stages.of(config)):
        return
    for name, value in known.items():
        if ("drop" in name and not name.startswith(_NOT_OF_THE_LM)) and isinstance(value, int | float) and value > 0:
            key = f"model.architecture.{name}"
            raise ConfigError(key, f"{value} draws other random numbers in every layout", f"set +{key}=0")

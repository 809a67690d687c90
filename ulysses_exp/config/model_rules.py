"""Rules for a model's configuration that need no transformers: what is set here, sizes, lengths, and what is causal."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ulysses_exp.config import stages
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.schema import Config

#: Keys of transformers' configurations that another key of ours decides, or that would change what is measured
_SET_ELSEWHERE = {
    "dtype": "set train.precision",
    "torch_dtype": "set train.precision",
    "attn_implementation": "set sp.attention",
    "_attn_implementation": "set sp.attention",
    "_attn_implementation_internal": "set sp.attention",
    "trust_remote_code": "set model.trust_remote_code",
    "_name_or_path": "set model.name_or_path",
    "name_or_path": "set model.name_or_path",
    "use_cache": "leave it out: training keeps no cache",
    "return_dict": "leave it out",
    "output_attentions": "leave it out: nothing reads them",
    "output_hidden_states": "leave it out: nothing reads them",
    "is_encoder_decoder": "leave it out: a causal LM has one part",
    "architectures": "set model.architecture.model_type",
    "auto_map": "set model.name_or_path and model.trust_remote_code",
    "quantization_config": "leave it out: quantized weights do not train here",
}

#: Whole numbers of at least 1, and at most what any machine could hold
_SIZES = {
    "num_hidden_layers": 10**4,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**40,
}

#: Types of layers of attention, which Ulysses shards
SHARDED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

#: Types of layers whose tokens do not see each other
WITHOUT_MIXING = {"mlp", "moe"}

#: Types of layers that mix tokens without attention, or beside it, where the modeling file has functions of `MIXING`
_MIXED_LAYERS = {"linear_attention", "conv", "hybrid"} | WITHOUT_MIXING

#: What a modeling file of transformers calls the functions that mix tokens without attention and are served by
#: `model.mixers`; whether all layers of a model are, is seen where it is built
MIXING = {
    "causal_conv1d_fn",
    "torch_chunk_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "mamba2_chunk_scan",
    "mamba_selective_scan",
    "_rnn_scan",
}


def check_given(config: Config, known: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is wrong with `model.architecture` as it was typed, or with the sizes in `known`.

    Args:
        known: the settings of the part that reads text, as far as they are known without transformers.
    """
    given = config.model.architecture
    for name, value in given.items():
        key = f"model.architecture.{name}"
        if name in _SET_ELSEWHERE:
            raise ConfigError(key, "is not for this place", _SET_ELSEWHERE[name])
        _check_finite(key, value)
    kind = given.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError("model.architecture.model_type", f"{kind!r} is not a name", "set e.g. llama")
    check_sizes(config, known)


def check_sizes(config: Config, known: Mapping[str, Any], real_names: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for a size that is no whole number of at least 1.

    Args:
        real_names: how this type of model calls a size, where that is another name.
    """
    for name, most in _SIZES.items():
        value = known.get(name)
        if value is None or isinstance(value, Mapping):
            continue
        values = value if isinstance(value, (list, tuple)) else [value]  # some have a size for each layer
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int) or not 1 <= one <= most:
                key = key_of(config, (real_names or {}).get(name, name))
                raise ConfigError(key, f"{str(one)[:40]!r} is no size", f"set a whole number from 1 to {most}")


def key_of(config: Config, name: str) -> str:
    """Where the user finds the setting `name` of the model: in an override, or in the model's own folder."""
    overridden = config.model.name_or_path is None or name in config.model.architecture
    return f"model.architecture.{name}" if overridden else f"model.name_or_path: config.json: {name}"


def _check_finite(key: str, value: Any) -> None:
    """Infinity is allowed inside a list only: `time_step_limit: [0, inf]`."""
    for inside, number in _numbers(value):
        if math.isnan(number) or (math.isinf(number) and not inside):
            raise ConfigError(key, f"{number} is not a finite number", "set a finite number")


def _numbers(value: Any, inside: bool = False) -> Iterator[tuple[bool, float]]:
    if isinstance(value, float):
        yield inside, value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _numbers(entry, inside)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _numbers(entry, True)


def check_length(config: Config, known: Mapping[str, Any], real_name: str = "max_position_embeddings") -> None:
    """Raises ConfigError where sequences are longer than the positions that the model has.

    A model whose rotary embedding is scaled reaches `original_max_position_embeddings` x `factor`; one that is scaled
    as it goes (`dynamic`) has no end. A plan computes nothing, so it is about any length.
    """
    limit, length = known.get("max_position_embeddings"), config.train.seq_len
    if not stages.starts_ranks(config) or not isinstance(limit, int) or length <= limit:
        return
    for scaled in ropes(known):
        kind = scaled.get("rope_type", scaled.get("type", "default"))
        if kind == "dynamic":
            return
        if kind != "default":
            original = scaled.get("original_max_position_embeddings") or limit
            limit = max(limit, int(original * (scaled.get("factor") or 1)))
    if length > limit:
        key = key_of(config, real_name)
        shorter = f"set train.seq_len to at most {limit}, or +model.architecture.{real_name}={length}"
        raise ConfigError("train.seq_len", f"{length} tokens are beyond {key}={limit}", shorter)


def ropes(known: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the rotary embedding: one, or one for each type of layer; none where there is no such thing."""
    rope = known.get("rope_parameters") or known.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return []
    nested = [entry for entry in rope.values() if isinstance(entry, Mapping)]
    return nested or [rope]


def check_rope(config: Config, known: Mapping[str, Any]) -> None:
    """Raises ConfigError for a rotary embedding that turns nothing, or by nan."""
    for rope in ropes(known):
        for name in ("rope_theta", "factor"):
            value = rope.get(name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(key_of(config, name), f"{value!r} turns no position", "set a number above 0")
    for name, value in known.items():
        if name.endswith(("_eps", "_epsilon")) and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ConfigError(key_of(config, name), f"{value} is not small", "set e.g. 1e-6")


def check_causal(config: Config, known: Mapping[str, Any], fills_gaps: bool) -> None:
    """Raises ConfigError where a token of the model sees those after it.

    Args:
        fills_gaps: transformers has a masked LM of this type, too: it is an encoder unless it says otherwise.
    """
    for name in ("is_decoder", "causal"):
        if fills_gaps and known.get(name) is False and not known.get("is_encoder_decoder"):
            key = key_of(config, name)
            problem = "the model sees the tokens after each token, which it is to predict"
            raise ConfigError(key, problem, f"set +model.architecture.{name}=true, or another model")
    if known.get("is_causal") is False or known.get("use_bidirectional_attention") in (True, "all"):
        name = "is_causal" if known.get("is_causal") is False else "use_bidirectional_attention"
        raise ConfigError(key_of(config, name), "a token would see those after it", "leave it out")


def why_not_sharded(name: str, layer_types: Any, mixing: Collection[str] = ()) -> str | None:
    """Why the sequences of a model cannot be shared out over ranks; None where they can.

    Args:
        name: of the model, for the reason.
        layer_types: as configured, None where all are alike.
        mixing: those of `MIXING` that the modeling file defines.
    """
    strange = set(layer_types or ()) - SHARDED_LAYERS - (_MIXED_LAYERS if mixing else set())
    if strange:
        return f"{name} has layers of type {', '.join(sorted(strange))}, which Ulysses does not shard"
    return None

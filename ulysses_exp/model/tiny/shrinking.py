"""A model's configuration made small: the same kinds of layers, few of each, and few of everything else.

What a model does only from some length on, a window, a chunk, a scale that grows with the position, begins within some
tokens, so that a short sequence meets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ulysses_exp.model.tiny.settings import DEFAULTS, SETTINGS

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WINDOW, POSITIONS = 96, 64, 4, 2, 16, 8, 256
_MOST_LAYERS = 8

#: What a tiny model has of a size, and the names of such sizes in transformers' configurations.
_NAMES = (
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        HIDDEN,
        "hidden_size n_embd d_model dim emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim lru_width",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads",
    ),
    (
        HEADS,
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_attention_heads_per_layer",
    ),
    (HEADS, "linear_num_heads linear_num_value_heads index_n_heads num_query_groups"),
    (HEAD_DIM, "head_dim global_head_dim swa_head_dim attention_head_dim kv_channels d_head dim_head index_head_dim"),
    (HEAD_DIM, "attention_head_size qk_head_dim indexer_head_dim"),
    (64, "intermediate_size ffn_dim d_ff dff n_inner encoder_ffn_dim decoder_ffn_dim dense_intermediate_size d_inner"),
    (64, "ffn_hidden_size dim_ff feed_forward_size intermediate_size_mlp"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size"),
    (32, "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk n_groups"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_shared_experts"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank"),
    (16, "chunk_size mamba_chunk_size block_size d_rel"),
    (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim linear_key_head_dim linear_value_head_dim"),
    (8, "linear_head_dim mamba_n_heads mamba_num_heads ssm_state_size mamba_d_state state_size time_step_rank"),
    (8, "mamba_dt_rank"),
    (WINDOW, "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size"),
    (WINDOW, "local_attention_window_len index_topk"),
    (20, "attention_chunk_size original_max_position_embeddings"),
    (6, "floor_scale log_scaling_n_floor"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    (POSITIONS, "model_max_length"),
)
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
_FEWER_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "kv_n_heads", "linear_num_key_heads")
_ALL_HEADS = ("num_attention_heads", "n_head", "num_heads", "swa_num_attention_heads", "linear_num_value_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_INDICES = (
    "moe_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "mlp_only_layers",
    "attn_layer_indices",
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A tiny copy of `config`, composite ones with all their parts; nothing random is left in it, and no cache.

    Raises:
        Exception: whatever transformers' configuration class says of sizes that do not fit each other.
    """
    given = config.to_dict()
    parts = {
        name: shrunk(part)
        for name in type(config).sub_configs
        if isinstance(part := getattr(config, name, None), PretrainedConfig)
    }
    settings = {name: value for name, value in given.items() if name not in ("transformers_version", "dtype")}
    settings |= _layers(settings)
    settings |= _sizes(settings) | parts
    for name, value in given.items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            settings[name] = 0.0
        if name == "rope_parameters" and isinstance(value, Mapping):
            settings[name] = _rope(value)
            if value.get("rope_type") == "dynamic":  # which begins where positions end
                settings["max_position_embeddings"] = _SIZES["original_max_position_embeddings"]
    settings |= SETTINGS.get(config.model_type, {})
    settings.pop("model_type", None)
    made = type(config)(**settings)
    made.use_cache = False
    return made


def tiny(model_type: str) -> PretrainedConfig:
    """The configuration of a type of model, with its defaults, made small."""
    kind: Any = CONFIG_MAPPING[model_type]
    return shrunk(kind(**DEFAULTS.get(model_type, {})))


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _TOKENS:
            small[name] = _TOKENS[name]
        elif isinstance(value, list) and name in _SIZES and value and isinstance(value[0], int):
            small[name] = [min(one, _SIZES[name]) for one in value]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in _SIZES and name not in _LAYERS:
            small[name] = min(value, _SIZES[name])
        elif name in _FEWER_HEADS:
            heads = [settings.get(n) for n in _ALL_HEADS]
            alike = value in heads or ("kv_lora_rank" in settings and "linear" not in name)
            small[name] = HEADS if alike else min(value, KV_HEADS)
    if settings.get("head_dim") is not None and settings.get("head_dim") == settings.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]  # where the rotary embedding reads it
    return small


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary embedding, or one for each kind of layer, that is scaled beyond its first tokens."""
    small: dict[str, Any] = {n: _rope(v) if isinstance(v, Mapping) else v for n, v in given.items()}
    turned = int(HEAD_DIM * (small.get("partial_rotary_factor") or 1)) // 2
    small |= {name: value[:turned] for name, value in small.items() if name in ("short_factor", "long_factor")}
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = _SIZES["original_max_position_embeddings"]
    return small


def _layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How many layers there are, and what is said of each: of each kind of layer its first, in order."""
    names = [n for n in _LAYERS if isinstance(settings.get(n), int)]
    if not names:
        return {}
    count = settings[names[0]]
    lists = {
        n: v
        for n, v in settings.items()
        if isinstance(v, (list, tuple)) and len(v) == count and count > 1 and n not in _INDICES
    }
    chosen = {n: settings[n] for n in _INDICES if isinstance(settings.get(n), (list, tuple))}
    own = {int(layer): said for layer, said in (settings.get("per_layer_config") or {}).items()}
    kinds: dict[Any, int] = {}
    for layer in range(count if lists or own or chosen else 0):
        kind = (str(own.get(layer)), *(str(v[layer]) for v in lists.values()), *(layer in v for v in chosen.values()))
        kinds.setdefault(kind, layer)
    kept = sorted(list(kinds.values())[:_MOST_LAYERS])
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    small: dict[str, Any] = dict.fromkeys(names, len(kept))
    small |= {n: [v[layer] for layer in kept] for n, v in lists.items()}
    small |= {n: [new for new, old in enumerate(kept) if old in v] for n, v in chosen.items()}
    if settings.get("num_kv_shared_layers") == count:
        small["num_kv_shared_layers"] = len(kept)
    if own:
        small["per_layer_config"] = {new: _own_sizes(own[old], settings) for new, old in enumerate(kept) if old in own}
    return small


def _own_sizes(own: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a layer with sizes of its own: heads twice as wide as the others' where they are wider."""
    small = _sizes({**settings, **own})
    small = {name: small.get(name, value) for name, value in own.items()}
    if "head_dim" in own and own["head_dim"] > settings["head_dim"]:
        small["head_dim"] *= 2
    return small

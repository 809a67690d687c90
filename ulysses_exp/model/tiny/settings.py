"""What some types of models need beyond smaller sizes: sizes that have to fit each other, and defaults that build."""

from __future__ import annotations

from typing import Any

_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: By `model_type`: sizes of the tiny model that names alone do not give.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_n_groups": 2},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "blt_local_encoder": {"hidden_size_global": 64, "num_key_value_heads": 4},
    "blt_local_decoder": {"hidden_size_global": 64, "num_key_value_heads": 4},
    "blt_global_transformer": {"num_key_value_heads": 4},
    "blt_patcher": {"num_key_value_heads": 4},
    "clip_vision_model": {"image_size": 28},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8, "mamba_n_groups": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_d_head": 16, "mamba_n_groups": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "nemotron_h": {"mamba_head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"], "num_hidden_layers": 2, "axial_pos_embds": False, "hash_seed": 0,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "attention_hidden_size": 128,
              "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "hybrid_layer_ids": [1, 3],
               "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_headdim": 16},
}  # fmt: skip

_DECODER = {"is_decoder": True}

#: By `model_type`: what the defaults of a type lack to be a causal LM, to be built at all, or to be more than a Llama.
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
                            "layer_types": ["sliding_attention", "full_attention"] * 20},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16, "num_hidden_layers": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"log_scaling_n_floor": 128000},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", *["conv"] * 29, "full_attention"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256,
                                  "indexer_budget": 8, "indexer_compress_ratio": 4}},
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}  # fmt: skip

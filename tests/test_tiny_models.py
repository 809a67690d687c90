"""Tiny models of any type of transformers: small, with every kind of layer that the type has, and nothing at zero."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ulysses_exp.model.tiny import built, shrunk, tiny

#: Types whose causal LM transformers cannot build here, or that is no causal LM of its own.
NOT_BUILT = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_next", "dots3_note_text"])
def test_a_tiny_model_runs_and_no_parameter_of_it_hides_anything(kind):
    model = built(tiny(kind))
    assert 20_000 < sum(p.numel() for p in model.parameters()) < 500_000
    assert all(p.std() > 0.03 for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), built(tiny(kind)).parameters(), strict=True))
    assert model(torch.arange(5, 53)[None], use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    "kind, types",
    [
        ("llama4_text", ["chunked_attention", "full_attention"]),
        ("qwen3_next", ["linear_attention", "full_attention"]),
        ("gemma3_text", ["sliding_attention", "full_attention"]),
        ("qwen2", ["full_attention", "full_attention"]),
    ],
)
def test_every_kind_of_layer_is_left_and_of_most_only_one(kind, types):
    assert tiny(kind).layer_types == types


def test_windows_chunks_and_scales_by_position_begin_within_some_tokens():
    assert tiny("gpt_oss").sliding_window == 8
    llama4 = tiny("llama4_text")
    assert (llama4.attention_chunk_size, llama4.floor_scale, llama4.no_rope_layers) == (20, 6, [1, 0])
    assert tiny("deepseek_v32").index_topk == 8


def test_what_layers_differ_in_they_still_differ_in():
    model = built(tiny("gemma4_text"))
    assert len({layer.self_attn.q_proj.weight.shape for layer in model.model.layers}) == 2


def test_a_tiny_copy_is_of_the_configuration_that_is_given():
    given = AutoConfig.for_model("qwen2", use_sliding_window=True, max_window_layers=3, num_hidden_layers=5)
    copy = shrunk(given)
    assert copy.layer_types == ["full_attention", "sliding_attention"] and copy.sliding_window == 8
    assert shrunk(AutoConfig.for_model("llama", num_key_value_heads=1)).num_key_value_heads == 1
    assert shrunk(AutoConfig.for_model("gpt2")).attn_pdrop == 0


@pytest.mark.long
def test_every_type_is_built_but_those_that_transformers_cannot():
    failed = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            built(tiny(kind))
        except Exception as error:
            failed[kind] = error
    assert failed.keys() <= NOT_BUILT, failed

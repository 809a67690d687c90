"""The FLOPs ledger: against the formula where one holds, against torch's own count of a real step, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ulysses_exp.config import MemoryConfig
from ulysses_exp.model.memory import apply
from ulysses_exp.rank.metrics.flops import again_flops, forward_flops, pairs, peak_flops, step_flops

NONE = MemoryConfig(name="none")

LLAMA = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def llama(**changes):
    return AutoConfig.for_model("llama", **LLAMA | changes)


@pytest.mark.parametrize("seq_len", [64, 1024, 100_000])
def test_plain_llama_is_six_a_weight_and_token_plus_causal_attention(seq_len):
    """6 N + 6 n_layer d T a token: PaLM's formula (arXiv 2204.02311, appendix B, 12 L H Q T) with half of the pairs."""
    layers, hidden, inner, vocab = 3, 256, 768, 512
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + vocab * hidden
    formula = (6 * weights + 6 * layers * hidden * seq_len) * seq_len
    counted = step_flops(llama(), seq_len=seq_len, sequences=1, memory=NONE, sp=1).model
    assert counted == pytest.approx(formula, rel=0.02)


def test_agrees_with_torchs_count_of_a_real_step():
    """Forward and backward on real tensors. Attention as plain matrix products: all pairs, also the masked ones."""
    seq_len = 128
    model = AutoModelForCausalLM.from_config(llama(), attn_implementation="sdpa")
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    once = forward_flops(llama())
    full = 3 * (once.linear * seq_len + sum(4.0 * seq_len**2 * a.heads * a.head_dim for a in once.attention))
    assert counter.get_total_flops() == pytest.approx(full, rel=0.001)


def test_a_window_bounds_what_a_token_sees():
    assert pairs(4, None) == 10
    assert pairs(4, 2) == 1 + 2 + 2 + 2
    assert pairs(4, 100) == 10
    gemma = AutoConfig.for_model(
        "gemma3_text", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=32,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    assert [layer.window for layer in forward_flops(gemma).attention] == [32, 32, 32, None]
    mistral = AutoConfig.for_model("mistral", **LLAMA, sliding_window=64)
    assert [layer.window for layer in forward_flops(mistral).attention] == [64] * 3


def test_grouped_queries_save_projections_and_no_scores():
    whole, grouped = forward_flops(llama()), forward_flops(llama(num_key_value_heads=2))
    assert grouped.attention == whole.attention
    assert whole.linear - grouped.linear == pytest.approx(3 * 2 * 2 * 256 * (256 - 64))


def test_experts_count_those_of_a_token():
    moe = AutoConfig.for_model(
        "qwen3_moe", **LLAMA, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        decoder_sparse_step=1,
    )  # fmt: skip
    once = forward_flops(moe)
    layer = 4 * 256**2 + 2 * 3 * 256 * 64 + 256 * 8
    assert once.linear == pytest.approx(2 * (3 * layer + 512 * 256), rel=0.01)


SAVERS = {
    "checkpointing": {"checkpointing": "non_reentrant"},
    "reentrant": {"checkpointing": "reentrant"},
    "tiled loss": {"tiled_loss": 4},
    "tiled MLP": {"tiled_mlp": -1},
    "all": {"checkpointing": "non_reentrant", "tiled_mlp": 4, "tiled_loss": 4},
    "all, reentrant": {"checkpointing": "reentrant", "tiled_mlp": 8, "tiled_loss": 2},
}
GEMMA = AutoConfig.for_model(
    "gemma3_text", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=1024, layer_types=["full_attention"] * 2,
)  # fmt: skip


@pytest.mark.parametrize("savers", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("architecture", [llama(), GEMMA], ids=["llama", "gemma3"])
def test_what_is_computed_again_is_the_hardwares(architecture, savers):
    """Against torch's count of real steps with and without the savers; of attention all pairs are counted there."""
    seq_len = 128
    memory = MemoryConfig(name="", **savers)

    def real(memory):
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation="sdpa").train()
        apply(model, memory)
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return counter.get_total_flops()

    again = again_flops(architecture, memory, seq_len)
    full = sum(4.0 * seq_len**2 * a.heads * a.head_dim for a in again.attention)
    assert again.linear * seq_len + full == pytest.approx(real(memory) - real(NONE), rel=1e-3)
    step = step_flops(architecture, seq_len=seq_len, sequences=2, memory=memory, sp=1)
    causal = sum(a.flops(seq_len) for a in again.attention)
    assert step.hardware - step.model == pytest.approx(2 * (again.linear * seq_len + causal))
    assert step.model == step_flops(architecture, seq_len=seq_len, sequences=2, memory=NONE, sp=1).hardware


def test_counting_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    forward_flops(llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=4))
    assert torch.equal(before, torch.get_rng_state())


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") is None
    assert peak_flops("cpu", "fp32") is None

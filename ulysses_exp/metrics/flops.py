"""Floating-point operations of an optimizer step: the model's own (MFU) and the hardware's (HFU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepFlops:
    """For the whole global batch, each token once. `model`: every operation once, causal pairs only, forward and
    backward. `hardware`: with what is computed again."""

    model: float
    hardware: float


#: Dense peak in FLOP/s without sparsity, by a part of torch's device name; from NVIDIA's data sheets (H100: "NVIDIA
#: H100 Tensor Core GPU", H200, A100 80GB, L40S, B200 likewise). fp32 is what torch does by default: no TF32.
PEAK = {
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "B200": {"bf16": 2250e12, "fp32": 75e12},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device; None for CPUs and devices that the table lacks."""
    return next((row[precision] for name, row in PEAK.items() if name in device_name), None)


def matmul_parameters(config: Any) -> float:
    """Weights that every token is multiplied with: projections, MLP and output head, no embedding table.

    Holds for decoders with a gated MLP (llama, mistral, qwen, gemma).
    """
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    attention = text.hidden_size * head * 2 * (text.num_attention_heads + kv_heads)
    mlp = 3 * text.hidden_size * getattr(text, "intermediate_size", 4 * text.hidden_size)
    return text.num_hidden_layers * (attention + mlp) + text.hidden_size * text.vocab_size


def attention_pairs(config: Any, seq_len: int) -> float:
    """Query-key pairs of a sequence over all layers, causal: T (T + 1) / 2, less where a layer sees a window."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    pairs = 0.0
    for layer in range(text.num_hidden_layers):
        local = types is None or types[layer] == "sliding_attention"
        reach = min(window, seq_len) if local and window is not None else seq_len
        pairs += reach * (reach + 1) / 2 + (seq_len - reach) * reach
    return pairs


def step_flops(config: Any, *, seq_len: int, sequences: int, recompute: bool) -> StepFlops:
    """FLOPs of an optimizer step over `sequences` sequences of `seq_len` tokens.

    A forward takes 2 operations a weight and token, and 4 a pair and head dimension (scores, then values); a backward
    twice as many (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, with the attention term exact and causal).
    """
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    weights = 2 * matmul_parameters(config) * seq_len
    scores = 4 * attention_pairs(config, seq_len) * text.num_attention_heads * head
    forward = sequences * (weights + scores)
    again = forward - sequences * 2 * text.hidden_size * text.vocab_size * seq_len if recompute else 0.0
    return StepFlops(model=3 * forward, hardware=3 * forward + again)

"""Tiny models and batches whose logits move a lot when a token sees what it should not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention.upstream import entry, kv_groups, sequence_parallel_state

BATCH, LENGTH, VOCABULARY, WINDOW = 2, 96, 64, 20

FAMILIES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 4},
    "gqa_replicated": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4},
    "window": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": WINDOW},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 4,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "uneven": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},  # SmolLM2-135M's heads
    "few_heads": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "one_kv_of_three": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 4,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_key_value_heads": 4,
        "sliding_window": WINDOW,
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4": {
        "model_type": "llama4_text",
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": WINDOW,
        "floor_scale": 8,
        "attn_scale": 0.5,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "head_dim": 4,
        "num_key_value_heads": 8,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 1024,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip

#: That transformers runs by its eager attention alone, or that DeepSpeed's exchange has no shapes for.
OURS_ALONE = ("uneven", "few_heads", "one_kv_of_three", "gpt_oss", "gemma2", "gemma4", "llama4", "deepseek_v3", "gpt2")


def model(family: str, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    arguments = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8, "max_position_embeddings": 1024,
        "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **FAMILIES[family], **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).train()
    for name, parameter in network.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, std=2.0)  # they start at zero
    return network


@contextmanager
def upstream(network: PreTrainedModel, sp: int, disable_in_eval: bool = False) -> Iterator[None]:
    """DeepSpeed's registration as its tutorial makes it, undone on exit."""
    with sequence_parallel_state(), kv_groups(network), entry(ALL_ATTENTION_FUNCTIONS, "sdpa"):
        UlyssesSPAttentionHF.register_with_transformers(network, "sdpa", sp, BATCH, disable_in_eval=disable_in_eval)
        torch.distributed.barrier()
        yield


@dataclass(frozen=True)
class Batch:
    """Whole sequences, [rows, LENGTH]."""

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None = None

    def part(self, sp: int, rank: int) -> slice:
        tokens = self.input_ids.shape[1] // sp
        return slice(rank % sp * tokens, (rank % sp + 1) * tokens)


def batch(kind: str, rows: int = BATCH) -> Batch:
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    plain = torch.arange(LENGTH).expand(rows, -1)
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    if kind == "plain":
        return Batch(ids, plain)
    if kind == "packed":
        lengths = ([40, 31, 25], [10, 50, 36])
        return Batch(ids, torch.stack([torch.cat([torch.arange(n) for n in lengths[b]]) for b in range(rows)]))
    if kind == "right":
        mask[0, 83:] = 0
        return Batch(ids, plain, mask)
    for b, pads in zip(range(rows), (13, 50), strict=False):
        mask[b, :pads] = 0
    if kind == "left":
        return Batch(
            ids, (mask.cumsum(1) - 1).masked_fill(mask == 0, 1), mask
        )  # padding at position 1, as in generate()
    if kind == "left_running":
        return Batch(ids, plain, mask)
    raise KeyError(kind)


BATCHES = ("plain", "packed", "right", "left", "left_running")


def forward(network: PreTrainedModel, data: Batch, part: slice = slice(None), mask: bool = True) -> Tensor:
    """Logits [rows, tokens, VOCABULARY]."""
    return network(
        input_ids=data.input_ids[:, part],
        position_ids=data.position_ids[:, part],
        attention_mask=data.mask[:, part] if mask and data.mask is not None else None,
        use_cache=False,
    ).logits


def alone(network: PreTrainedModel, data: Batch) -> Tensor:
    """Logits as of `forward`, each document in a batch of its own; zero at padding."""
    rows = []
    for b, (ids, positions) in enumerate(zip(data.input_ids, data.position_ids, strict=True)):
        real = torch.ones_like(ids) if data.mask is None else data.mask[b]
        parts, starts = [], torch.ones(len(ids), dtype=torch.bool)
        starts[1:] = (real[1:] != real[:-1]) | ((positions[1:] != positions[:-1] + 1) & (real[1:] == 1))
        for part in torch.arange(len(ids)).tensor_split(starts.nonzero().flatten().tolist()[1:]):
            whole = forward(network, Batch(ids[part][None], torch.arange(len(part))[None]))[0]
            parts.append(whole * real[part, None])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def loss(logits: Tensor, data: Batch, part: slice = slice(None)) -> Tensor:
    """A weighted sum over real tokens: its parts over slices add up to the whole, and no direction cancels."""
    weight = torch.randn(*data.input_ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(2))
    if data.mask is not None:
        weight = weight * data.mask[..., None]
    return (logits * weight[:, part]).sum()


def largest(difference: Tensor, data: Batch, part: slice = slice(None)) -> float:
    """Over real tokens."""
    difference = difference.detach().abs().amax(-1)
    if data.mask is not None:
        difference = difference * data.mask[:, part]
    return float(difference.max())

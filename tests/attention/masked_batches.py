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
}


def model(family: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    arguments = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8, "max_position_embeddings": 1024,
        "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **FAMILIES[family], **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).train()


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

"""Tiny models whose layers mix tokens without attention, and batches that show whether documents stay apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, LENGTH = 64, 96
MIXED = ["linear_attention", "full_attention", "linear_attention"]

_ATTENTION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_DELTA = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": MIXED,
}  # fmt: skip
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_n_groups": 2,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": _ATTENTION | _DELTA | _EXPERTS,
    "qwen3_5_text": _ATTENTION | _DELTA,
    "olmo_hybrid": _ATTENTION | _DELTA | {"linear_num_key_heads": 4},
    "kimi_linear": _ATTENTION | _EXPERTS | {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "linear_head_dim": 8, "linear_num_heads": 4, "n_group": 1, "topk_group": 1, "layer_types": MIXED,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "bamba": _ATTENTION | _MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": _ATTENTION | _MAMBA2 | {"mamba_d_ssm": 64, "mamba_rms_norm": True, "num_hidden_layers": 2},
    "granitemoehybrid": _ATTENTION | _MAMBA2 | _EXPERTS | {"shared_intermediate_size": 16, "layer_types": MIXED},
    "nemotron_h": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "layers_block_type": [*MIXED, "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "ssm_state_size": 8, "chunk_size": 16,
    },
    "zamba2": _ATTENTION | {
        "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 16, "n_mamba_heads": 8,
        "mamba_d_state": 8, "mamba_ngroups": 2, "chunk_size": 16, "mamba_expand": 2, "num_mem_blocks": 1,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 4,
    },
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2,
        "chunk_size": 16,
    },
    "jamba": _ATTENTION | {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
        "expert_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "lfm2": _ATTENTION | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": _ATTENTION | {"lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 1},
}  # fmt: skip

#: One of each kind: gated delta rule, Mamba 2, Mamba 1, convolution alone, RG-LRU. The others are marked long
SHORT = ("qwen3_next", "bamba", "mamba", "lfm2", "recurrent_gemma")


def model(family: str, **changes: Any) -> PreTrainedModel:
    """No parameter is at the special value that it starts from."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **ends, **FAMILIES[family] | changes)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    # larger ones show more; the delta rule solves triangular systems and enlarges the rounding of fp32 with them (with
    # everything in fp64 its gradients are off by 3e-14 at most, those of the others by 1e-15)
    large = 0.08 if "linear_num_value_heads" in FAMILIES[family] else 0.15
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * (large if parameter.dim() > 1 else 0.1)
    return network


@dataclass(frozen=True)
class Batch:
    """Whole sequences; `lengths` are the real documents of each row, (first token, one past the last)."""

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    documents: tuple[tuple[tuple[int, int], ...], ...]

    def part(self, sp: int, rank: int) -> slice:
        tokens = self.input_ids.shape[1] // sp
        return slice(rank % sp * tokens, (rank % sp + 1) * tokens)

    @property
    def real(self) -> Tensor:
        return torch.ones_like(self.input_ids) if self.mask is None else self.mask


#: At sp 4 slices end at 24, 48 and 72. Documents shorter than the convolution, borders beside and within its reach of
#: the ends of slices, and a document over three slices
PACKED = (((0, 23), (23, 25), (25, 49), (49, 50), (50, 96)), ((0, 10), (10, 72), (72, 75), (75, 96)))


def batch(kind: str) -> Batch:
    rows: tuple[tuple[tuple[int, int], ...], ...] = {
        "plain": (((0, LENGTH),),) * 2,
        "packed": PACKED,
        "padded": (((13, LENGTH),), ((0, 47),)),  # one left, one right
        "packed_and_padded": (((2, 30), (30, 80)), ((26, 96),)),
    }[kind]
    ids = torch.randint(3, VOCABULARY, (len(rows), LENGTH), generator=torch.Generator().manual_seed(2))
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, documents in enumerate(rows):
        for start, stop in documents:
            positions[row, start:stop] = torch.arange(stop - start)
            mask[row, start:stop] = 1
    return Batch(ids, positions, None if bool(mask.all()) else mask, rows)


def forward(network: torch.nn.Module, data: Batch, part: slice = slice(None), mask: bool = True) -> Tensor:
    """Logits [rows, tokens, VOCABULARY]."""
    return network(
        input_ids=data.input_ids[:, part],
        position_ids=data.position_ids[:, part],
        attention_mask=data.mask[:, part] if mask and data.mask is not None else None,
        use_cache=False,
    ).logits


def alone(network: torch.nn.Module, data: Batch) -> Tensor:
    """Logits of every real document in a batch of its own; zero at padding."""
    rows = []
    for row, documents in enumerate(data.documents):
        at, parts = 0, []
        for start, stop in (*documents, (LENGTH, LENGTH)):
            parts.append(torch.zeros(start - at, VOCABULARY))
            if start < stop:
                one = Batch(data.input_ids[row : row + 1], data.position_ids[row : row + 1], None, ())
                parts.append(forward(network, one, slice(start, stop))[0])
            at = stop
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def loss(logits: Tensor, data: Batch, part: slice = slice(None)) -> Tensor:
    """A weighted sum over real tokens: its parts over slices add up to the whole, and no direction cancels."""
    weight = torch.randn(*data.input_ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(3))
    return (logits * (weight * data.real[..., None])[:, part]).sum()


def gradients(network: torch.nn.Module) -> Tensor:
    """All of them, in one."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in network.parameters()])  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())

"""transformers 5.23.0: packed documents see each other in layers that mix tokens without attention, on one process."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "qwen3_next": SHARED | {
        "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "bamba": SHARED | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": SHARED | {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "lfm2": SHARED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": SHARED,  # attention alone, which keeps them apart
}  # fmt: skip


@torch.no_grad()
def leak(kind: str) -> float:
    """How far the logits of a document are off when another is packed before it, relative by norm."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, 64, (1, 96))
    positions = torch.cat([torch.arange(41), torch.arange(55)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits[:, 41:]
    alone = model(ids[:, 41:], position_ids=positions[:, 41:], use_cache=False).logits
    return float((packed - alone).norm() / alone.norm())


leaks = {kind: leak(kind) for kind in MODELS}
print("a packed document's logits against it alone:", ", ".join(f"{kind} {x:.0e}" for kind, x in leaks.items()))
mended = all(x < 1e-4 for kind, x in leaks.items() if kind != "llama")
raise SystemExit(1 if mended or leaks["llama"] > 1e-4 else 0)

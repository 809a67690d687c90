"""With fewer KV heads than sp ranks a forward changes the model: it breaks when used without the patch afterwards.

deepspeed 0.19.8 (ulysses_sp.py: `module.num_key_value_groups = ...`, never set back), transformers 5.23.0, sdpa.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SP, LENGTH = 2, 32
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=1,
)  # fmt: skip


@torch.no_grad()
def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").train()
    tokens = torch.randint(64, (1, LENGTH))
    padding_mask = torch.ones(1, LENGTH, dtype=torch.long)
    padding_mask[:, :4] = 0
    model(tokens, attention_mask=padding_mask, use_cache=False)  # works
    groups = [model.model.layers[0].self_attn.num_key_value_groups]

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
    part = slice(rank * LENGTH // SP, (rank + 1) * LENGTH // SP)
    model(tokens[:, part], position_ids=torch.arange(LENGTH)[None, part], use_cache=False)
    groups.append(model.model.layers[0].self_attn.num_key_value_groups)

    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa")  # the unpatched attention again
    try:
        model(tokens, attention_mask=padding_mask, use_cache=False)
        error = "none"
    except RuntimeError as failure:
        error = str(failure)
    if rank == 0:
        torch.save((groups, error), f"{folder}/result")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        (before, after), error = torch.load(f"{folder}/result")
    print(f"num_key_value_groups: {before} before a sharded forward, {after} after; then unpatched: {error}")
    sys.exit(0 if before != after else 1)

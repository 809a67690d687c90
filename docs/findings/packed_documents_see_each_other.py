"""Under sequence parallelism packed documents attend to each other: the wrapper drops the mask that separates them.

deepspeed 0.19.8 (ulysses_sp.py, `uattn_wrapper`: `attention_mask = None`), transformers 5.23.0, sdpa. Two documents
in one sequence, told apart by position_ids that start again at 0; logits of the second against the unpatched model's.
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

SP, DOCUMENT = 2, 32
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@torch.no_grad()
def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").train()
    for parameter in model.parameters():
        parameter.mul_(5)  # attention that looks at some tokens more than at others, as in a trained model
    tokens = torch.randint(64, (1, 2 * DOCUMENT))
    positions = torch.arange(DOCUMENT).repeat(2)[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    causal = torch.ones(1, 1, 2 * DOCUMENT, 2 * DOCUMENT, dtype=torch.bool).tril()
    joined = model(tokens, position_ids=positions, attention_mask=causal, use_cache=False).logits

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
    part = slice(rank * DOCUMENT, (rank + 1) * DOCUMENT)
    sharded = model(tokens[:, part], position_ids=positions[:, part], use_cache=False).logits
    if rank == 1:
        torch.save({"packed": packed[:, part], "joined": joined[:, part], "sharded": sharded}, f"{folder}/logits")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        logits = torch.load(f"{folder}/logits")
    error = (logits["sharded"] - logits["packed"]).abs().max().item()
    leak = (logits["sharded"] - logits["joined"]).abs().max().item()
    print(f"second document, max |logit difference|: {error:.2f} from unpatched, {leak:.1e} from plain causal")
    sys.exit(0 if error > 1e-3 else 1)

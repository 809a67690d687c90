"""Without position_ids a sharded forward raises nothing and computes something else.

deepspeed 0.19.8 (ulysses_sp.py asserts `"position_ids" in kwargs`), transformers 5.23.0: the model fills in positions
0, 1, ... of its own shard before the attention is called, so the assertion never fires.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SP, LENGTH = 2, 64
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def gradient(model: LlamaForCausalLM, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # attention that looks at some tokens more than at others, as in a trained model
    tokens = torch.randint(64, (1, LENGTH + 1))
    inputs, labels, positions = tokens[:, :-1], tokens[0, 1:], torch.arange(LENGTH)[None]
    right = gradient(model, cross_entropy(model(inputs).logits[0], labels))

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
    part = slice(rank * LENGTH // SP, (rank + 1) * LENGTH // SP)
    errors = []
    for given in {"position_ids": positions[:, part]}, {}:
        logits = model(inputs[:, part], use_cache=False, **given).logits[0]
        sharded = gradient(model, cross_entropy(logits, labels[part], reduction="sum") / LENGTH)
        dist.all_reduce(sharded)
        errors.append(((sharded - right).norm() / right.norm()).item())
    if rank == 0:
        torch.save(errors, f"{folder}/errors")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        given, missing = torch.load(f"{folder}/errors")
    print(f"relative error of the gradient: {given:.1e} with position_ids, {missing:.2f} without, and no error raised")
    sys.exit(0 if missing > 1e-3 else 1)

"""A sequence that is not divisible by sp loses its last tokens, and no forward or backward says so.

deepspeed 0.19.8: the length is only checked by `UlyssesSPDataLoaderAdapter`; whoever shards by its rule
(`chunk = length // sp`) without it trains on less. transformers 5.23.0.
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

SP, LENGTH = 4, 67
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
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
    tokens = torch.randint(64, (1, LENGTH + 1))
    inputs, labels, positions = tokens[:, :-1], tokens[0, 1:], torch.arange(LENGTH)[None]
    right = gradient(model, cross_entropy(model(inputs).logits[0], labels))

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=1)
    chunk = LENGTH // SP
    part = slice(rank * chunk, (rank + 1) * chunk)
    logits = model(inputs[:, part], position_ids=positions[:, part], use_cache=False).logits[0]
    count = torch.tensor(labels[part].numel())
    dist.all_reduce(count)
    sharded = gradient(model, cross_entropy(logits, labels[part], reduction="sum") / count)
    dist.all_reduce(sharded)
    if rank == 0:
        torch.save((count.item(), ((sharded - right).norm() / right.norm()).item()), f"{folder}/result")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        count, error = torch.load(f"{folder}/result")
    print(f"{count} of {LENGTH} tokens used, gradient off by {error:.0%}, and no error raised")
    sys.exit(0 if count < LENGTH else 1)

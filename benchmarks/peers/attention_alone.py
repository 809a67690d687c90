"""The step's calls of the attention kernel and nothing else: no model, exchange or optimizer. What every program pays.

torchrun --nproc-per-node N benchmarks/peers/attention_alone.py job.json result.json
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from job import Job, Record


def train(job: Job) -> Record:
    """Forward and backward of each layer's `scaled_dot_product_attention` as a rank has it after the exchange."""
    record = Record(job)
    a = job.architecture
    tokens = job.read_tokens().shape[2] - 1
    dim = a.get("head_dim") or a["hidden_size"] // a["num_attention_heads"]
    heads, kv_heads = a["num_attention_heads"] // job.sp, max(1, a["num_key_value_heads"] // job.sp)
    layers = [
        [torch.randn(1, n, tokens, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
        for _ in range(a["num_hidden_layers"])
    ]
    grad = torch.ones(1, tokens, heads, dim).transpose(1, 2)
    for _ in range(job.steps):
        for _ in range(job.accumulation()):
            outputs = [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in layers]
            for output in reversed(outputs):
                output.backward(grad)
        record.step(torch.zeros(()), None)
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(Job.load(sys.argv[1])).write(sys.argv[2])
    dist.destroy_process_group()

"""Under sequence parallelism flex_attention gets a plain causal mask, whatever mask the model built.

deepspeed 0.19.8 (ulysses_sp.py: "currently hardcodes a causal mask_mod"), torch 2.13.0. The attention module is called
with the block mask of a sliding window; a core attention that only looks at its mask says what arrives.
"""

import os
import signal
import sys
import tempfile
from types import SimpleNamespace

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.nn.attention.flex_attention import create_block_mask, create_mask

LENGTH, WINDOW, HEADS, HEAD_SIZE = 64, 8, 2, 8


def window(batch, head, query, key):
    return (query >= key) & (query - key < WINDOW)


def main(folder: str) -> tuple[int, int]:
    """Number of (query, key) pairs that may attend: in the model's mask, in the mask that arrives."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=0, world_size=1)
    arrived = []

    def core(module, query, key, value, mask, **kwargs):
        arrived.append(mask)
        return query.transpose(1, 2), None

    attention = UlyssesSPAttentionHF(core, 1, HEADS, HEAD_SIZE, HEADS, 1, dist.group.WORLD, seq_length_is_variable=True)
    attention.core_attn_implementation = "flex_attention"
    heads = torch.randn(1, HEADS, LENGTH, HEAD_SIZE)
    mask = create_block_mask(window, 1, None, LENGTH, LENGTH, device="cpu")
    module = SimpleNamespace(training=True)
    attention(module, heads, heads, heads, mask, position_ids=torch.arange(LENGTH)[None])
    pairs = [create_mask(each.mask_mod, 1, 1, LENGTH, LENGTH, device="cpu").sum().item() for each in (mask, *arrived)]
    dist.destroy_process_group()
    return pairs[0], pairs[1]


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        built, arrived = main(folder)
    print(f"(query, key) pairs that may attend: {built} in the model's mask, {arrived} in the core attention's")
    sys.exit(0 if arrived != built else 1)

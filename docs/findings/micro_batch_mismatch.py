"""A rank whose batch is not of the registered micro batch size fails the others too, and no message names the cause.

deepspeed 0.19.8 (ulysses_sp.py, `forward`: the shape is asserted after the first collective), transformers 5.23.0. Two
sequences are registered. Rank 1 alone has one, as from the last batch of a loader: the collectives before the assertion
do not match any more; gloo kills a rank or waits until its time limit. Where all ranks have one, each names the shapes.
"""

import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import LlamaConfig, LlamaForCausalLM

SP, LENGTH, REGISTERED = 2, 32, 2
TIMEOUT = timedelta(seconds=5)
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@torch.no_grad()
def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed(
        "gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP, timeout=TIMEOUT
    )
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").train()
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", SP, micro_batch_size=REGISTERED)
    positions = torch.arange(rank * LENGTH, (rank + 1) * LENGTH)[None]
    for case, batch in ("every rank", REGISTERED - 1), ("rank 1 alone", REGISTERED - rank):
        start = time.perf_counter()
        try:
            model(torch.zeros(batch, LENGTH, dtype=int), position_ids=positions.expand(batch, -1), use_cache=False)
            outcome = "no error"
        except Exception as failure:
            outcome = type(failure).__name__
        Path(f"{folder}/{case} {rank}").write_text(f"{outcome} after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, join=False, start_method="fork")
        for process in ranks.processes:
            process.join()
        outcome = {}
        for case in "every rank", "rank 1 alone":
            files = [Path(f"{folder}/{case} {rank}") for rank in range(SP)]
            outcome[case] = [file.read_text() if file.exists() else "killed" for file in files]
    print("wrong micro batch size on", "; on ".join(f"{case}: {', '.join(ranks)}" for case, ranks in outcome.items()))
    explained = all(rank.startswith(("AssertionError", "ValueError")) for rank in outcome["rank 1 alone"])
    sys.exit(1 if explained else 0)

"""`UlyssesSPDataLoaderAdapter` yields each sample sp times, unless the loader's sampler differs between the sp ranks.

deepspeed 0.19.8 (ulysses_sp.py, `refill`: gathers one batch from every rank, each of which read the same one;
DeepSpeed issue 7484). A plain DataLoader of four samples.
"""

import os
import signal
import sys
import tempfile

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
from torch.utils.data import DataLoader

SP, SAMPLES, LENGTH = 2, 4, 8


def on_rank(rank: int, folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled here, about half a minute
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    tokens, positions = torch.ones(LENGTH, dtype=torch.long), torch.arange(LENGTH)
    samples = [{"input_ids": n * tokens, "labels": n * tokens, "position_ids": positions} for n in range(SAMPLES)]
    loader = DataLoader(samples, batch_size=1)
    adapter = UlyssesSPDataLoaderAdapter(loader, rank, torch.distributed.group.WORLD, SP, torch.device("cpu"))
    if rank == 0:
        torch.save([batch["input_ids"][0, 0].item() for batch in adapter], f"{folder}/seen")
    else:
        list(adapter)


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=SP, start_method="fork")
        seen = torch.load(f"{folder}/seen")
    print(f"samples of one epoch at sp {SP}: {list(range(SAMPLES))} in the loader, {seen} from the adapter")
    sys.exit(0 if len(seen) > SAMPLES else 1)

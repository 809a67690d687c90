"""Where LOCAL_SIZE is the world size, DeepSpeed's CPU backend leaves a file of 69 MB a rank in /dev/shm, at any exit.

deepspeed 0.19.8 (ops/csrc/cpu/comm/shm.cpp creates it, nothing unlinks it; the `deepspeed` launcher sets LOCAL_SIZE in
launcher/launch.py). Needs a C++ compiler and ninja: the operator is built at the first `init_distributed`, used or not.
This script removes the files that its ranks made.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import deepspeed
import torch

WORLD = 2


def on_rank(rank: int, folder: str, name: str) -> None:
    sys.stdout = sys.stderr  # the builder prints
    # address and port are only a part of the files' names here: the ranks meet in a file
    os.environ |= {"LOCAL_SIZE": str(WORLD), "MASTER_ADDR": name, "MASTER_PORT": "0"}
    deepspeed.init_distributed("gloo", False, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    signal.alarm(180)
    name = f"finding{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(on_rank, (folder, name), nprocs=WORLD, start_method="fork")
        finally:
            files = [each for each in Path("/dev/shm").glob("deepspeed_allreduce_buffer*") if name in each.name]
            sizes = [each.stat().st_size / 1e6 for each in files]
            for each in files:
                each.unlink()
    print(f"files in /dev/shm after a clean exit of {WORLD} ranks: {len(sizes)}, MB: {[round(size) for size in sizes]}")
    sys.exit(0 if sizes else 1)

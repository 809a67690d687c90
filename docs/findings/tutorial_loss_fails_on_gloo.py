"""The differentiable all_gather of the tutorial's loss fails in backward on gloo where sp is below the world size.

torch 2.13.0 (torch/distributed/nn/functional.py, `_AlltoAll`): its gloo branch scatters from every rank *of the group*
in turn, and passes that number to `scatter` as the global rank of the source.
"""

import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
import torch.distributed.nn.functional

WORLD, SP = 4, 2


def on_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    groups = [dist.new_group(list(range(first, first + SP))) for first in range(0, WORLD, SP)]
    loss = torch.ones((), requires_grad=True)
    try:
        sum(dist.nn.functional.all_gather(loss, group=groups[rank // SP])).backward()
        error = ""
    except ValueError as failure:
        error = str(failure).split("<")[0]
    Path(f"{folder}/{rank}").write_text(error)


if __name__ == "__main__":
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=WORLD, start_method="fork")
        errors = [Path(f"{folder}/{rank}").read_text() for rank in range(WORLD)]
    print(f"backward of all_gather at world {WORLD}, groups of {SP}, by rank:", [error or "ok" for error in errors])
    sys.exit(0 if any(errors) else 1)

"""Real ranks for the tests of checkpoints: forks of a warm server, which meet through a file and talk over loopback."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["ulysses_exp.rank.preload"]


class RankError(AssertionError):
    """What a rank raised, with its trace."""


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `work(*args)` on `world` ranks of a fresh process group; returns what each of them returned.

    Raises:
        RankError: a rank raised, died or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start(world, work, *args, folder=Path(folder))
        for process in processes:
            process.join(timeout)
        late = [p for p in processes if p.is_alive()]
        for process in late:
            process.kill()
        errors = sorted(Path(folder).glob("error*"))
        if errors:
            raise RankError("\n".join(path.read_text() for path in errors))
        if late or any(p.exitcode for p in processes):
            raise RankError(f"exit codes {[p.exitcode for p in processes]}, late: {len(late)}")
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world)]


def start(world: int, work: Callable[..., Any], *args: Any, folder: Path) -> list[multiprocessing.Process]:
    """Starts the ranks and returns at once. `folder` takes what they leave."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.pop("LOCAL_SIZE", None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = []
    for rank in range(world):
        process = context.Process(target=_rank, args=(rank, world, folder, work, args), daemon=True)
        process.start()
        processes.append(process)
    return processes


def _rank(rank: int, world: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        import datetime

        import deepspeed
        import torch

        from ulysses_exp.rank.upstream import without_operators_of_its_own

        torch.set_num_threads(1)
        deepspeed.utils.logger.setLevel("ERROR")
        without_operators_of_its_own()
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        result = work(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise

"""Sessions of real ranks whose work is a function of a step, for what a job does not report or takes longer for."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_steps.step import Row, Setting
from ulysses_exp.config import Config, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.launch.environment import prepare
from ulysses_exp.launch.orphans import die_with_parent
from ulysses_exp.launch.task import Task


def configured(setting: Setting, *overrides: str) -> Config:
    """The configuration of a job that trains, without a tracker."""
    return resolve(composed([f"device={setting.device}", "tracker.mode=disabled", "stages=[train]", *overrides])[0])


def rows(setting: Setting, name: str, config: Config, work: Callable[..., Iterator[Row]], *args: Any) -> Iterator[Row]:
    """Yields what `work(session, *args)` yields on rank 0; all ranks of `config`'s layout do it.

    Raises:
        RuntimeError: a rank failed.
    """
    folder = setting.folder / name
    folder.mkdir()
    prepare(setting.device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_rank, args=(number, config, folder, sending, work, args))
        for number in range(config.layout.world)
    ]
    for rank in ranks:
        rank.start()
    sending.close()
    while True:
        try:
            yield receiving.recv()
        except EOFError:
            break
    for rank in ranks:
        rank.join()
    failed = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
    if failed:
        raise RuntimeError(failed[0].read_text().strip().splitlines()[-1])
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"ranks ended with exit codes {[rank.exitcode for rank in ranks]}")


def _rank(
    number: int, config: Config, folder: Path, sending: Connection, work: Callable[..., Iterator[Row]], args: Any
) -> None:
    die_with_parent()
    world = str(config.layout.world)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    try:
        import torch

        from ulysses_exp.rank.session import open_session
        from ulysses_exp.rank.worker import process_group

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        task = Task("gpu", config, (), folder)
        store = torch.distributed.FileStore(str(folder / "meeting"), config.layout.world)
        with process_group(task, number, store), open_session(task, number) as session:
            for row in work(session, *args):
                if number == 0:
                    sending.send(row)
    except BaseException:
        (folder / f"error{number}").write_text(traceback.format_exc())
        sending.close()
        os._exit(1)  # what is left of the group is not taken down: others may wait in it

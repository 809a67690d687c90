"""Sessions of a small model on real ranks, as the stages get them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ulysses_exp.config import Config, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.launch import Task
from ulysses_exp.layout import Layout
from ulysses_exp.rank.session import Session, open_session

#: Two layers, so that many engines are built in a few seconds.
SMALL = ["stages=[train]", "device=cpu", "train.seq_len=32", "train.global_batch_size=4", "train.steps=4",
         "model.architecture.num_hidden_layers=2", "tracker.mode=disabled"]  # fmt: skip


def configured(*overrides: str) -> Config:
    return resolve(composed([*SMALL, *overrides])[0])


@contextlib.contextmanager
def session(config: Config, folder: Path, **options: object) -> Iterator[Session]:
    """On the ranks of the running process group."""
    assert config.layout.world == dist.get_world_size()
    task = Task("test", config, (), folder, options)
    with open_session(task, dist.get_rank()) as opened:
        yield opened


def at(config: Config, layout: str, offload: bool = False) -> Config:
    """`config` in another layout, perhaps with its optimizer states in host memory."""
    placed = config.at(Layout.parse(layout))
    return replace(placed, zero=replace(placed.zero, offload_optimizer=offload, param_persistence_threshold=0))

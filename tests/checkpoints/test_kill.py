"""A rank that is killed at any moment of a save: the newest complete checkpoint opens, and the curve goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_ranks import run, start
from tiny_engine import engine, steps

from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints

LAYOUT = Layout(1, 2, 2)
MOMENTS = 20


def uninterrupted(count: int) -> list[float]:
    with engine(LAYOUT) as made:
        return steps(made, LAYOUT, 0, count)


def go_on(folder: Path, record: Path, victim: int, event: int) -> int:
    """Two steps from the newest checkpoint and two saves, in which `victim` kills itself as it touches a file.

    Args:
        event: how many times it touches the folder before; 0 lives on.

    Returns:
        How many times this rank touched the folder.
    """
    rank = dist.get_rank()
    with engine(LAYOUT) as made:
        first = 0
        latest = folder / "latest"
        if latest.exists():
            loaded = checkpoints.load(made, folder / latest.read_text(), layout=LAYOUT)
            assert loaded.weights_bit_exact and loaded.optimizer_bit_exact
            first = loaded.step
        events = _Events(folder, kill_at=event if rank == victim else 0)
        for step in range(first, first + 2):
            losses = steps(made, LAYOUT, step, 1)
            if rank == 0:
                with record.open("a") as file:
                    file.write(json.dumps([step, losses[0]]) + "\n")
            checkpoints.save(made, folder / f"step{step + 1}", layout=LAYOUT, step=step + 1, state={}, keep=2)
    return events.seen


class _Events:
    """Counts how often this process opens, renames or removes something in `folder`, from Python's own audit events."""

    _NAMES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir")

    def __init__(self, folder: Path, kill_at: int):
        self.seen, self._folder, self._kill_at = 0, str(folder), kill_at
        sys.addaudithook(self._hook)

    def _hook(self, name: str, arguments: tuple[object, ...]) -> None:
        if name in self._NAMES and any(isinstance(a, (str, os.PathLike)) and self._folder in str(a) for a in arguments):
            self.seen += 1
            if self.seen == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(600)
def test_every_kill_leaves_a_checkpoint(tmp_path: Path) -> None:
    events = run(2, go_on, tmp_path / "undisturbed", tmp_path / "losses", -1, 0)
    # rank 1 opens a file a save; rank 0 others, and gives and removes the names
    moments = [(1, event) for event in range(1, 1 + min(events[1], 5))]
    count = MOMENTS - len(moments)
    moments += [(0, 1 + round(i * (events[0] - 1) / (count - 1))) for i in range(count)]
    assert len(set(moments)) == MOMENTS, events

    folder, record = tmp_path / "checkpoints", tmp_path / "losses.jsonl"
    for number, (victim, event) in enumerate(moments):
        ranks = start(2, go_on, folder, record, victim, event, folder=_empty(tmp_path / f"ranks{number}"))
        ranks[victim].join(120)
        for rank in ranks:  # what a launcher does when one of its ranks has died
            rank.kill()
            rank.join()
        assert ranks[victim].exitcode == -signal.SIGKILL, (victim, event)
    losses = [json.loads(line) for line in record.read_text().splitlines()]
    reached = max(step for step, _ in losses)
    expected = run(2, uninterrupted, reached + 1)[0]
    assert reached >= 4
    assert all(loss == expected[step] for step, loss in losses)  # bit for bit


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder

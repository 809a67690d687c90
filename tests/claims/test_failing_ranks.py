"""Ranks that fail cost the claims that they were measuring, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ulysses_exp.config import resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.launch import RankFailure, Task
from ulysses_exp.layout import Layout
from ulysses_exp.stages.claims import parent, room
from ulysses_exp.stages.claims.sentences import CLAIMS

CONFIG = resolve(composed(["experiment=claims", "device=cpu"])[0])
LAYOUT = Layout(2, 1, 1)


class RanksThatFail:
    """In the place of a job: its ranks fail in one part."""

    def __init__(self, folder: Path, part: str, message: str):
        self.folder, self.part, self.message = folder, part, message
        self.tasks: list[str] = []

    def do(self, task: Task, work: str) -> dict[str, Any]:
        self.tasks.append(task.name)
        if self.part in task.options["parts"]:
            raise RankFailure(1, self.message)
        return {claim.key: [] for claim in CLAIMS if claim.part in task.options["parts"]}


def measured(job: Any, parameters: int = 1000) -> dict[str, Any]:
    return parent._measured(job, CONFIG, "upstream", LAYOUT, room.Room(job, CONFIG, parameters))


def test_each_part_is_asked_again_by_itself(tmp_path: Path) -> None:
    job = RanksThatFail(tmp_path, "gradients", "ValueError: Global rank 0 is not part of group <x>")
    found = measured(job)
    assert len(job.tasks) == len(set(job.tasks)) == 1 + len(parent.PARTS)
    assert found == {claim.key: [] for claim in CLAIMS if claim.key not in ("C7", "C10")} | {
        "C7": [], "C10": {"error": f"rank 1: {job.message}"}
    }  # fmt: skip


def test_out_of_memory_is_not_tried(tmp_path: Path) -> None:
    found = measured(RanksThatFail(tmp_path, "weights", "out of memory (RuntimeError: can't allocate memory)"))
    assert "out of memory" in found["C5"]["not_tried"] and found["C6"] == []


def test_what_the_machine_has_no_room_for_starts_no_rank(tmp_path: Path) -> None:
    job = RanksThatFail(tmp_path, "none", "")
    found = measured(job, parameters=10**12)
    assert job.tasks == [] and {claim.key for claim in CLAIMS} == set(found)
    assert all("of memory" in entry["not_tried"] for entry in found.values())


def test_without_disk_there_are_no_checkpoints(tmp_path: Path, monkeypatch) -> None:
    job = RanksThatFail(tmp_path, "none", "")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    found = measured(job)
    assert {key for key, entry in found.items() if entry} == {"C6", "C7", "C8", "C9"}
    assert "of disk" in found["C6"]["not_tried"]

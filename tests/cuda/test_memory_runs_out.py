"""What is said of a GPU's memory beside the peak of what was allocated, and what is left where it runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ulysses_exp.config import Config, ConfigError, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.launch import Task
from ulysses_exp.launch.failure import first_failure, record
from ulysses_exp.rank.metrics import memory, memory_snapshot

GIB = 2**30


def test_what_is_beside_the_allocator_is_what_the_device_lacks_and_it_has_not_reserved(monkeypatch):
    stats = {"reserved_bytes.all.peak": 70 * GIB, "reserved_bytes.all.current": 60 * GIB, "num_alloc_retries": 3,
             "num_ooms": 1}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (17 * GIB, 80 * GIB))
    assert memory.allocator(torch.device("cuda", 0)) == {
        "peak_reserved_bytes": 70 * GIB, "alloc_retries": 3, "ooms": 1, "beside_allocator_bytes": 3 * GIB
    }  # fmt: skip


@pytest.fixture
def task(tmp_path):
    config = Config()
    task = Task("main", replace(config, device="cuda", memory=replace(config.memory, snapshot=True)), (), tmp_path)
    task.results.mkdir(parents=True)
    return task


def test_a_rank_out_of_memory_leaves_its_allocations_and_the_error_says_where(task, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"allocations"))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    record(task.results, 3, error, memory_snapshot.leave(task, 3, error))
    failure = first_failure(task.results, {3: 1})
    assert failure.out_of_memory
    assert str(failure) == (
        "rank 3: out of memory, its allocations are in ranks/main/memory-rank3.pickle "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB)"
    )
    assert (task.folder / "ranks/main/memory-rank3.pickle").read_bytes() == b"allocations"


def test_other_errors_and_a_full_disk_leave_nothing(task, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    assert memory_snapshot.leave(task, 0, ValueError("no")) is None
    assert memory_snapshot.leave(task, 0, torch.OutOfMemoryError("CUDA out of memory")) is None


def test_allocations_are_noted_where_asked(task, monkeypatch):
    noted = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: noted.append(kwargs))
    memory_snapshot.begin(replace(task, config=replace(task.config, memory=Config().memory)))
    assert not noted
    memory_snapshot.begin(task)
    assert noted == [{"max_entries": 100_000, "stacks": "python"}]


def test_on_cpu_there_is_no_allocator_to_note():
    with pytest.raises(ConfigError, match=r"memory.snapshot: notes what CUDA's allocator does"):
        resolve(composed(["device=cpu", "memory.snapshot=true"])[0])

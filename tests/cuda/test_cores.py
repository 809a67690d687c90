"""Threads and cores of ranks beside GPUs, and what Slurm is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import Config, LaunchConfig, machine
from ulysses_exp.launch import Task, environment
from ulysses_exp.launch.slurm import parameters, shape
from ulysses_exp.layout import Layout
from ulysses_exp.rank.cores import threads


@pytest.mark.parametrize(
    ("device", "given", "count"),
    [
        ("cpu", {}, 1), ("cuda", {}, 12), ("cuda", {"OMP_NUM_THREADS": "3"}, 3), ("cpu", {"OMP_NUM_THREADS": "3"}, 3),
        ("cuda", {"LOCAL_WORLD_SIZE": "200"}, 1),
    ],
)  # fmt: skip
def test_beside_gpus_a_rank_takes_its_share_of_the_cores_unless_the_user_says(monkeypatch, device, given, count):
    monkeypatch.setattr(machine, "cores", lambda: 96.0)
    monkeypatch.setattr(environment, "os", type("os", (), {"environ": dict(given), "pathsep": ":"}))
    for _ in range(2):  # a job has several tasks
        environment.prepare(device)
    ranks = environment.os.environ
    assert threads(device, {"LOCAL_WORLD_SIZE": "8"} | ranks) == count


BIND = """
import os, sys, threading
from torch.numa import binding
from ulysses_exp.rank.cores import bind_beside
core = max(os.sched_getaffinity(0))
before = len(os.sched_getaffinity(0))
binding._get_numa_node_index_for_gpu_index = lambda gpu_index: {3: 1}[gpu_index]
binding._get_cpu_indices_for_numa_node_MAYBE_NOT_ALLOWED = lambda numa_node_index: {1: {core, 4095}}[numa_node_index]
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
bind_beside(3)
bound = [os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id)]
def unknown(gpu_index):
    raise FileNotFoundError("numa_node")
binding._get_numa_node_index_for_gpu_index = unknown
bind_beside(3)
end.set()
print(bound == [{core}] * 2, os.sched_getaffinity(0) == {core})
"""


def test_all_threads_of_a_rank_run_beside_its_gpu_and_a_machine_that_does_not_say_is_no_error():
    ended = subprocess.run(
        [sys.executable, "-c", BIND], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stdout == "True True\n", ended.stderr
    assert "not bound to the cores beside GPU 3: numa_node" in ended.stderr


@pytest.mark.parametrize(
    ("world", "sp", "expected"),
    [
        (8, 8, (1, 8)), (4, 2, (1, 4)), (16, 16, (2, 8)), (12, 2, (2, 6)), (12, 4, (2, 8)), (15, 5, (3, 5)),
        (11, 1, (2, 6)), (10, 10, (2, 5)), (9, 3, (2, 6)),
    ],
)  # fmt: skip
def test_ranks_are_spread_over_nodes_and_no_group_is_torn_that_one_node_holds(world, sp, expected):
    nodes, per_node = shape(world, sp, 8)
    assert (nodes, per_node) == expected
    assert nodes * per_node >= world and per_node <= 8
    assert sp > 8 or per_node % sp == 0


@pytest.mark.parametrize(
    ("device", "launch", "cores", "memory"),
    [
        ("cpu", {}, None, None), ("auto", {}, 8, None), ("cuda", {"cpus_per_task": 12, "mem_gb": 900}, 12, 900),
        ("cpu", {"cpus_per_task": 2}, 2, None),
    ],
)  # fmt: skip
def test_slurm_is_asked_for_cores_and_memory(device, launch, cores, memory):
    config = replace(Config(), device=device).at(Layout(4, 3, 3))
    found = parameters(Task("main", config, (), Path("run")), replace(LaunchConfig(), **launch))
    assert (found.get("cpus_per_task"), found.get("mem_gb")) == (cores, memory)
    assert found.get("slurm_srun_args") == (None if cores is None else [f"--cpus-per-task={cores}"])
    assert (found["nodes"], found["tasks_per_node"]) == (2, 8)

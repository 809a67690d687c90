"""Ranks on a Slurm cluster: one submission a task, through submitit. The parent stays where it is and waits.

The run folder has to lie on a file system that the compute nodes share.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

from ulysses_exp.config import LaunchConfig
from ulysses_exp.config.stages import resolve
from ulysses_exp.launch.environment import THREADS_FOR_US_TO_SAY
from ulysses_exp.launch.environment import prepare as prepare_environment
from ulysses_exp.launch.failure import first_failure
from ulysses_exp.launch.orphans import die_with_parent
from ulysses_exp.launch.rank import WORKER
from ulysses_exp.launch.server import PRELOAD
from ulysses_exp.launch.supervision import prepare
from ulysses_exp.launch.task import Task

#: Cores of a rank beside a GPU: what nodes of 64 and more with 8 GPUs have. Slurm's own default is one
_CORES = 8


def shape(world: int, sp: int, gpus_per_node: int) -> tuple[int, int]:
    """(nodes, tasks on each) for `world` ranks: the fewest nodes, the same number on each, no sequence-parallel group
    across nodes where one holds it. There may be more tasks than ranks; the last ones then do nothing."""
    unit = sp if sp <= gpus_per_node else 1  # ranks that stay together
    units = world // unit
    nodes = math.ceil(units / (gpus_per_node // unit))
    return nodes, math.ceil(units / nodes) * unit


def parameters(task: Task, launch: LaunchConfig) -> dict[str, Any]:
    """What submitit is told of the submission."""
    nodes, per_node = shape(task.layout.world, task.layout.sp, launch.gpus_per_node)
    cpu = task.config.device == "cpu"
    cores = launch.cpus_per_task or (None if cpu else _CORES)
    found: dict[str, Any] = {
        "name": f"ulysses-exp-{task.name}",
        "nodes": nodes,
        "tasks_per_node": per_node,
        "timeout_min": launch.time_min,
        "slurm_partition": launch.partition,
        "slurm_account": launch.account,
        "slurm_gpus_per_node": None if cpu else per_node,
    }
    if cores is not None:  # srun has not taken it from sbatch since Slurm 22.05
        found |= {"cpus_per_task": cores, "slurm_srun_args": [f"--cpus-per-task={cores}"]}
    if launch.mem_gb is not None:
        found["mem_gb"] = launch.mem_gb
    return found


class SlurmRanks:
    """Submits each task with as many Slurm tasks as it has ranks, `launch.gpus_per_node` on a node."""

    def __init__(self, launch: LaunchConfig):
        self.launch = launch

    def run(self, task: Task) -> None:
        """Submits `task` and waits for it. Raises RankFailure, KeyboardInterrupt (the submission is cancelled)."""
        import submitit

        prepare(task)
        prepare_environment(task.config.device)
        told = parameters(task, self.launch)
        executor = submitit.AutoExecutor(folder=task.results / "slurm", cluster=self.launch.cluster)
        executor.update_parameters(**told)
        job = executor.submit(_rank, task, told["nodes"], told.get("cpus_per_task"))
        try:
            job.results()
        except KeyboardInterrupt:
            job.cancel()
            raise
        except Exception as error:  # submitit raises what a rank raised, or its own; the ranks left what they know
            raise first_failure(task.results, dict.fromkeys(range(task.layout.world))) from error

    def close(self) -> None:
        """Nothing waits between tasks."""


def _rank(task: Task, nodes: int, cores: int | None) -> None:
    import submitit

    die_with_parent()
    here = submitit.JobEnvironment()
    world, per_node = task.layout.world, here.num_tasks // nodes
    if here.global_rank >= world:
        return
    os.environ.update(
        RANK=str(here.global_rank), LOCAL_RANK=str(here.local_rank), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(min(per_node, world - here.node * per_node)),
    )  # fmt: skip
    if cores is not None and os.environ.pop(THREADS_FOR_US_TO_SAY, ""):  # Slurm may bind a task to them, or not
        os.environ["OMP_NUM_THREADS"] = str(cores)
    from torch.distributed import FileStore, Store, TCPStore

    resolve(PRELOAD)

    store: Store
    if nodes == 1:
        store = FileStore(str(task.results / "meeting"), world)
    else:
        timeout = timedelta(seconds=task.config.launch.timeout_s)
        port = 20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10_000  # two jobs may share a node
        store = TCPStore(here.hostnames[0], port, world, here.global_rank == 0, timeout)
    resolve(WORKER)(task, here.global_rank, store)

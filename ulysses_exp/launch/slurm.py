"""Ranks on a Slurm cluster: one submission a task, through submitit. The parent stays where it is and waits.

The run folder has to lie on a file system that the compute nodes share.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta

from ulysses_exp.config import LaunchConfig
from ulysses_exp.config.stages import resolve
from ulysses_exp.launch.environment import prepare as prepare_environment
from ulysses_exp.launch.failure import first_failure
from ulysses_exp.launch.orphans import die_with_parent
from ulysses_exp.launch.rank import WORKER
from ulysses_exp.launch.server import PRELOAD
from ulysses_exp.launch.supervision import prepare
from ulysses_exp.launch.task import Task

_PORT = 29571  # of the first node; only where ranks are on several


class SlurmRanks:
    """Submits each task with as many Slurm tasks as it has ranks, `launch.gpus_per_node` on a node."""

    def __init__(self, launch: LaunchConfig):
        self.launch = launch

    def run(self, task: Task) -> None:
        """Submits `task` and waits for it. Raises RankFailure, KeyboardInterrupt (the submission is cancelled)."""
        import submitit

        prepare(task)
        prepare_environment(task.config.device)
        world, launch = task.layout.world, self.launch
        per_node = min(world, launch.gpus_per_node)
        nodes = math.ceil(world / per_node)
        executor = submitit.AutoExecutor(folder=task.results / "slurm", cluster=launch.cluster)
        executor.update_parameters(
            name=f"ulysses-exp-{task.name}",
            nodes=nodes,
            tasks_per_node=per_node,
            timeout_min=launch.time_min,
            slurm_partition=launch.partition,
            slurm_account=launch.account,
            slurm_gpus_per_node=None if task.config.device == "cpu" else per_node,
        )
        job = executor.submit(_rank, task, nodes)
        try:
            job.results()
        except KeyboardInterrupt:
            job.cancel()
            raise
        except Exception as error:  # submitit raises what a rank raised, or its own; the ranks left what they know
            raise first_failure(task.results, dict.fromkeys(range(world))) from error

    def close(self) -> None:
        """Nothing waits between tasks."""


def _rank(task: Task, nodes: int) -> None:
    import submitit

    die_with_parent()
    here = submitit.JobEnvironment()
    os.environ.update(
        RANK=str(here.global_rank), LOCAL_RANK=str(here.local_rank), WORLD_SIZE=str(here.num_tasks),
        LOCAL_WORLD_SIZE=str(here.num_tasks // nodes),
    )  # fmt: skip
    from torch.distributed import FileStore, Store, TCPStore

    resolve(PRELOAD)

    store: Store
    if nodes == 1:
        store = FileStore(str(task.results / "meeting"), here.num_tasks)
    else:
        timeout = timedelta(seconds=task.config.launch.timeout_s)
        store = TCPStore(here.hostnames[0], _PORT, here.num_tasks, here.global_rank == 0, timeout)
    resolve(WORKER)(task, here.global_rank, store)

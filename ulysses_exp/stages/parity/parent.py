"""Stage `parity`, the part of the parent: both runs, and what they come to."""

from __future__ import annotations

from collections.abc import Callable

from ulysses_exp.experiment.job import Job
from ulysses_exp.launch import Task
from ulysses_exp.stages.parity import comparison


def run(job: Job, note: Callable[[str], None]) -> None:
    """The steps in one process, then in the job's layout; their weights are removed once they have been compared.

    In bf16 one process makes them in fp32 as well.
    """
    folders, runs = [], []
    tasks = [("parity-reference", job.config.reference()), ("parity-layout", job.config)]
    if comparison.by_noise(job.config):
        tasks.append(("parity-fp32", comparison.in_fp32(job.config.reference())))
    for name, config in tasks:
        note(f"{name.replace('-', ' ')}: {config.layout}")
        task = Task(name, config, ("trajectory",), job.folder)
        runs.append(job.do(task, "trajectory"))
        folders.append(task.results)
    full = (folders[2], runs[2]) if len(tasks) == 3 else None
    job.take("parity", comparison.compare(job.config, folders[0], folders[1], (runs[0], runs[1]), full))
    for folder in folders:
        for weights in folder.glob("weights*"):
            weights.unlink()

"""Stage `parity`, the part of the parent: both runs, and what they come to."""

from __future__ import annotations

from collections.abc import Callable

from ulysses_exp.experiment.job import Job
from ulysses_exp.launch import Task
from ulysses_exp.stages.parity import comparison


def run(job: Job, note: Callable[[str], None]) -> None:
    """The steps in one process, then in the job's layout; their weights are removed once they have been compared."""
    folders, runs = [], []
    for name, config in (("parity-reference", job.config.reference()), ("parity-layout", job.config)):
        note(f"{name.replace('-', ' ')}: {config.layout}")
        task = Task(name, config, ("trajectory",), job.folder)
        runs.append(job.do(task, "trajectory"))
        folders.append(task.results)
    reference, ours = folders
    job.take("parity", comparison.compare(job.config, reference, ours, (runs[0], runs[1])))
    for weights in (*reference.glob("weights*"), *ours.glob("weights*")):
        weights.unlink()

"""Stage `train`, the part of the parent."""

from __future__ import annotations

from collections.abc import Callable

from ulysses_exp.config import stages
from ulysses_exp.experiment.job import Job, StageFailure
from ulysses_exp.stages.train import longest


def run(job: Job, note: Callable[[str], None]) -> None:
    """One task: training, and what other stages want of the engine that has trained."""
    if job.config.longest.search:
        _find_longest(job, note)
    work, options = ["train"], job.source_options()
    for stage in stages.of(job.config):
        if stage.after_training is not None and (more := stages.resolve(stage.after_training)(job, note)) is not None:
            names, its_options = more
            work += names
            options |= its_options
    job.do_main(tuple(work), options)


def _find_longest(job: Job, note: Callable[[str], None]) -> None:
    """Makes the longest sequence that trains the length of this job."""
    found = job.beside.setdefault("train", {})
    tokens = longest.find(job.config, job.folder, job.do, found, note)
    if tokens == 0:
        raise StageFailure(f"no sequence trains: {found['tries'][-1]['reason']}")
    job.config = longest.at_length(job.config, tokens)

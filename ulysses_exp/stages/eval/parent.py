"""Stage `eval`, the part of the parent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ulysses_exp.config.schema import Config
from ulysses_exp.experiment.job import Job
from ulysses_exp.plan.planner import bypassed_evaluation_bytes


def run(job: Job, note: Callable[[str], None]) -> None:
    """A task of its own, where the ranks that trained have not evaluated already."""
    if job.config.eval.mode == "none":
        job.take("eval", {"status": "ok", "mode": "none"})
        return
    job.needs("train")
    task = job.task("eval", ("eval",), job.checkpoint_options() | _options(job.config, note))
    job.main = job.main or task
    job.take("eval", job.do(task, "eval"))


def after_training(job: Job, note: Callable[[str], None]) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """The engine that has trained evaluates."""
    return None if job.config.eval.mode == "none" else (("eval",), _options(job.config, note))


def _options(config: Config, note: Callable[[str], None]) -> dict[str, Any]:
    """What `eval.mode=auto` is decided by; the ranks know how much memory is free."""
    if config.eval.mode != "auto" or config.layout.sp == 1:
        return {}
    note("eval.mode=auto: planning the evaluation of a whole sequence on one rank")
    return {"bypassed_evaluation_bytes": bypassed_evaluation_bytes(config)}
